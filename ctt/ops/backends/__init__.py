"""Implementations of the operations.

A backend is a module of this package with one function per operation that it implements, named as
the operation, and `why_not(operation, device)`, which gives None where the operation can run on
that device and otherwise the reason and what would work. The arguments have been checked by the
public function before a backend sees them:

    ema_update_(teacher, student, decay, plan) -> None
    class_topk(confidence, label, k, num_classes, valid) -> (index, count)
    queue_push_(keys, count, cursor, features, index) -> None
    info_nce(query, label, keys, count, mask, temperature, reduction, need_grad, need_slope)
        -> (loss, grad, slope)
    pair_info_nce(query, positive, label, keys, counts, mask, temperature, reduction, need_grad,
                  need_slope) -> (loss, grad, slope)

`plan` keeps what a backend makes for the lists of tensors (`ctt.ops._plans`).

`grad` is the gradient of the loss with respect to `query`, in the dtype that
`ctt.ops._library.gradient_dtype` names: its own, but float32 for float16 queries. For reduction
"none" it is the gradient of the sum, because the loss of a pixel depends on that pixel's query
alone. It is None where `need_grad` is false. `slope` is the derivative of the loss, () or (N,), by
the temperature; None where `need_slope` is false. A temperature is a tensor of shape () where it
lies on a device.
"""
