"""Trained networks at work: loading, predicting, evaluating, drawing, exporting."""
