"""Networks on the Hugging Face hub: safetensors with a model card, nothing that is unpickled."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from ctt import __version__, run
from ctt.checkpoint import description, save_network
from ctt.errors import UserError
from ctt.files import HUB, sha256
from ctt.inference.load import TrainedNetworks

WEIGHTS = "model.safetensors"
CONFIG = "config.json"  # by which the hub counts downloads; what is read lies in the weights


def endpoint() -> str | None:
    """Return the hub that HF_ENDPOINT names; None: the public one."""
    return os.environ.get("HF_ENDPOINT") or None


def download(place: str) -> Path:
    """Return the file of weights of a repository, from the hub or from its cache.

    Args:
        place: `owner/name` or `owner/name@revision`.

    Raises:
        UserError: there is none, or it cannot be downloaded.
    """
    import huggingface_hub

    repository, _, revision = place.partition("@")
    try:
        file = huggingface_hub.hf_hub_download(
            repository, WEIGHTS, revision=revision or None, endpoint=endpoint()
        )
    except Exception as error:  # the hub's client raises errors of several libraries
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{HUB}{place}: {WEIGHTS} cannot be downloaded from the hub ({reason}). Give "
            f"{HUB}OWNER/NAME of a repository that ctt-export --push has made, and HF_TOKEN if "
            f"it is private."
        ) from None
    return Path(file)


def push(trained: TrainedNetworks, folder: Path, repository: str, private: bool = False) -> str:
    """Write the one network of `trained` to a repository of the hub, with a model card.

    Args:
        folder: of the run, whose summary.json has the scores, if there is one.
        repository: `owner/name`; it is made where there is none.
        private: whether it is then seen by its owner alone.

    Returns:
        the address.

    Raises:
        UserError: it cannot be written, as without a token (HF_TOKEN, or `hf auth login`).
    """
    import huggingface_hub

    network = trained.only()
    api = huggingface_hub.HfApi(endpoint=endpoint())
    with tempfile.TemporaryDirectory() as temporary:
        files = Path(temporary)
        facts, protocol = (network, trained.info, trained.origin), trained.settings.eval
        save_network(files / WEIGHTS, *facts, protocol=protocol)
        config = {"library_name": "ctt", **description(*facts, protocol)}
        (files / CONFIG).write_text(json.dumps(config, indent=2), "utf-8")
        (files / "README.md").write_text(card(trained, folder, repository), "utf-8")
        try:
            address = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repository,
                folder_path=files,
                commit_message=f"Weights of ctt {__version__}",
            )
        except Exception as error:  # as above
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(
                f"`push` {repository}: the hub does not take it ({reason}). Log in by `hf auth "
                f"login` or the environment variable HF_TOKEN, with a token that may write."
            ) from None
    return str(address)


def card(trained: TrainedNetworks, folder: Path, repository: str) -> str:
    """Return the model card: what the network sees and says, how it was trained, how to use it."""
    from huggingface_hub import EvalResult, ModelCardData

    info, summary = trained.info, summary_of(folder)
    best = summary.get("best") if _is_best_of(folder, trained) else None
    score = best.get("miou") if isinstance(best, dict) else None
    result = EvalResult(
        task_type="image-segmentation",
        dataset_type=info.name,
        dataset_name=info.name,
        metric_type="mean_iou",
        metric_value=score,
    )
    head = ModelCardData(
        library_name="ctt",
        pipeline_tag="image-segmentation",
        tags=["semantic-segmentation", "semi-supervised"],
        model_name=repository.rpartition("/")[2],
        eval_results=None if score is None else [result],
    )
    rows = [
        f"| {c} | {name} | {'#{:02x}{:02x}{:02x}'.format(*colour)} |"
        for c, (name, colour) in enumerate(zip(info.classes, info.palette, strict=True))
    ]
    options = trained.only().options
    seen = f"{info.channels} bands of rasters, numbers {list(info.bands)} of a file"
    backbone = f" on {options['backbone']}" if options["backbone"] else ""
    facts = [
        f"- Network: {options['name']}{backbone}",
        f"- Images: {seen if info.bands else 'RGB'} of any size",
        f"- Weights: {trained.origin}",
    ]
    if summary:
        facts.append(
            f"- Training: {summary.get('method')} with {summary.get('labeled')} labelled and "
            f"{summary.get('unlabeled')} unlabelled images of {info.name}, "
            f"{summary.get('iterations')} iterations"
        )
    if score is not None:
        facts.append(
            f"- Score: mIoU {score} on {summary.get('images')} images to evaluate on, among which "
            f"the best network was chosen, so it is optimistic"
        )
    use = [
        "import ctt",
        "",
        f'network = ctt.load("{HUB}{repository}")',
        'label = network.predict("photo.jpg")',
    ]
    return "\n".join(
        [
            "---",
            head.to_yaml().strip(),
            "---",
            "",
            f"# {repository.rpartition('/')[2]}",
            "",
            "Semantic segmentation, trained by ctt from few labelled and many unlabelled images.",
            "",
            *facts,
            "",
            "```python",
            *use,
            "```",
            "",
            "| number | class | colour |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def _is_best_of(folder: Path, trained: TrainedNetworks) -> bool:
    """Return whether this is the best network of the run, which alone its summary scores: any other
    one may lie in the folder as a file."""
    best = folder / run.WEIGHTS
    return best.is_file() and sha256(best) == trained.sha256


def summary_of(folder: Path) -> dict[str, Any]:
    """Return what summary.json of a run holds; nothing where there is none, or another file of this
    name."""
    try:
        summary = json.loads((folder / run.SUMMARY).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return summary if isinstance(summary, dict) else {}
