"""The page of ctt-app."""

from __future__ import annotations

import html
import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import gradio as gr
import matplotlib
import torch
from gradio.data_classes import ImageData
from PIL import Image
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

from ctt.cli.page_ranking import ranking
from ctt.data.dataset import IGNORE, DatasetInfo
from ctt.data.rasters import read_as
from ctt.errors import UserError
from ctt.inference.load import TrainedNetworks
from ctt.inference.predict import best_class, protocol_text, reraise_out_of_memory
from ctt.inference.render import OVERLAY, colorize, overlay
from ctt.settings import EvalSettings
from ctt.text import printable

EXAMPLES = 8  # evaluation images offered
SHOWN = (320, 1280)  # longer side of a picture on the page, in pixels: smallest and largest
USER = "ctt"  # who gives the password
MEGABYTE = 10**6
KEPT = 10**9  # bytes of predictions that are not computed again
# The browser itself refuses whatever is not from here: fonts, scripts, pictures.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "connect-src 'self' data: blob: ws: wss:"
)
CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
.head h1 { font-size: 22px; margin: 0 0 4px; }
.head p { margin: 0; font-size: 14px; opacity: 0.8; overflow-wrap: anywhere; }
#image img { object-fit: contain; width: 100%; height: 100%; }
.picture label[data-testid="block-label"] { position: static; border: 0; background: none; }
.picture .icon-button-wrapper { transform: translateY(-100%); border: 0; }
#legend { padding: 0; }
#legend p { margin: 0 0 8px; font-size: 14px; }
#legend table, #legend th, #legend td, #legend tr { border: 0; background: none; }
#legend table { border-collapse: collapse; width: 100%; font-size: 14px; margin: 0; }
#legend th { font-weight: 600; padding: 2px 0 2px 12px; text-align: right; white-space: nowrap; }
#legend td { padding: 2px 0 2px 12px; text-align: right; font-variant-numeric: tabular-nums; }
#legend th:first-child, #legend td:first-child { padding-left: 0; text-align: left; }
#legend tr.absent td { opacity: 0.45; }
.swatch { display: inline-block; width: 14px; height: 14px; border-radius: 3px;
  margin-right: 9px; vertical-align: -2px; border: 1px solid rgba(128, 128, 128, 0.6); }
.scale { height: 10px; border-radius: 3px; }
.ends { display: flex; justify-content: space-between; font-size: 12px; opacity: 0.75; }
"""
Found = tuple[Tensor, Tensor, Tensor]


class Viewer:
    """Predictions of a run's networks, and the pictures that the page shows of them."""

    def __init__(
        self, trained: TrainedNetworks, device: torch.device, settings: EvalSettings
    ) -> None:
        self.trained, self.device, self.settings = trained, device, settings
        self.info = trained.info
        self.names = trained.names()
        # by file and network, the latest at the end, with the time of the file that they are of
        self.kept: OrderedDict[tuple[str, str], tuple[int, Found]] = OrderedDict()
        self.lock = threading.Lock()

    def predict(self, file: str, name: str) -> Found:
        """Return image (C, H, W), and labels and confidence (H, W) of `best_class`, on the CPU.

        The latest results are kept, of at most `KEPT` bytes together.

        Raises:
            UserError: the image cannot be read, or there is not enough memory for it.
        """
        changed = Path(file).stat().st_mtime_ns if Path(file).exists() else 0
        with self.lock:
            kept = self.kept.get((file, name))
            if kept is not None and kept[0] == changed:
                self.kept.move_to_end((file, name))
                return kept[1]
        found = self._predict(file, name)
        with self.lock:
            self.kept[file, name] = changed, found
            self.kept.move_to_end((file, name))
            while sum(x.nbytes for _, tensors in self.kept.values() for x in tensors) > KEPT:
                self.kept.popitem(last=False)
        return found

    def _predict(self, file: str, name: str) -> Found:
        image = read_as(Path(file), self.info)
        predict = self.trained.choose([name]).predictor(self.device, self.settings)
        with torch.no_grad(), reraise_out_of_memory(self.settings):
            confidence, label = best_class(predict(image[None])[0], image)
        return image, label.cpu(), confidence.cpu()

    def show(self, file: str | None, opacity: float, *names: str) -> list[Any]:
        """Return overlay, mask and confidence of each network, and the legend."""
        if file is None:
            return [None] * (3 * len(names)) + [legend([], [], self.info)]
        try:
            found = [self.predict(file, name) for name in names]
        except UserError as error:
            text = printable(str(error).replace(file, Path(file).name))
            raise gr.Error(text, print_exception=False) from None
        pictures: list[Any] = []
        for image, label, confidence in found:
            pictures += [
                enlarged(overlay(image, label, self.info, opacity)),
                enlarged(Image.fromarray(colorize(label, self.info).numpy())),
                enlarged(confidence_colours(confidence)),
            ]
        return [*pictures, legend(names, [label for _, label, _ in found], self.info)]

    def examples(self, folder: Path) -> list[str]:
        """Return files of some evaluation images, if the dataset is at hand."""
        try:
            dataset = self.trained.settings.open_dataset()
            ids = dataset.eval_ids()[:EXAMPLES]
            files = []
            if dataset.info.bands:  # of which a picture would hold three
                return [str(file) for name in ids for file in dataset.files(name, labeled=False)]
            for number, name in enumerate(ids):
                picture = Image.fromarray(dataset.image(name).permute(1, 2, 0).numpy())
                files.append(str(folder / f"{number}.png"))
                picture.save(files[-1])
        except (UserError, OSError):
            return []
        return files


def upload() -> gr.Image:
    """Return where an image is dropped; its file comes as it is, see `read_image`."""
    image = gr.Image(
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        label="picture",
        height=300,
        elem_id="image",
    )
    decode = image.preprocess

    def read_upload(payload: ImageData | None) -> Any:
        return payload.path if payload is not None and payload.path else decode(payload)

    # gradio opens the file itself, and of a broken one the user would read no word; a subclass
    # makes it write a .pyi beside this file
    image.preprocess = read_upload  # type: ignore[method-assign]
    return image


def confidence_colours(confidence: Tensor) -> Image.Image:
    """Return probabilities (H, W) in matplotlib's viridis colours, as in samples.png."""
    colours = matplotlib.colormaps["viridis"](confidence.numpy(), bytes=True)
    return Image.fromarray(colours[..., :3].copy())


def enlarged(picture: Image.Image) -> Image.Image:
    """Return small pictures enlarged to whole pixels, and large ones reduced to a screen."""
    smallest, largest = SHOWN
    side = max(picture.size)
    if side < smallest:
        factor = -(-smallest // side)
        size = (picture.width * factor, picture.height * factor)
        return picture.resize(size, Image.Resampling.NEAREST)
    picture.thumbnail((largest, largest))
    return picture


def legend(names: tuple[str, ...] | list[str], labels: list[Tensor], info: DatasetInfo) -> str:
    """Return HTML: colour and name of each class, and its share of the pixels by network.

    Args:
        labels: (H, W) uint8 of each network, 255 where the image has no data; these do not count.
    """
    labels = [label[label != IGNORE] for label in labels]
    counts = [torch.bincount(label.flatten(), minlength=len(info.classes)) for label in labels]
    head = "".join(f"<th>{html.escape(readable(name))}</th>" for name in names)
    rows = []
    for c, name in enumerate(info.classes):
        shares = [float(count[c]) / max(1, int(count.sum())) for count in counts]
        cells = "".join(f"<td>{share:.1%}</td>" if share else "<td>-</td>" for share in shares)
        colour = "#{:02x}{:02x}{:02x}".format(*info.palette[c])
        kind = ' class="absent"' if shares and not any(shares) else ""
        rows.append(
            f'<tr{kind}><td><span class="swatch" style="background: {colour}"></span>'
            f"{html.escape(name)}</td>{cells}</tr>"
        )
    agree = ""
    if len(labels) > 1 and len(labels[0]):
        share = float((labels[0] == labels[1]).float().mean())
        agree = f"<p>Both see the same class in <b>{share:.1%}</b> of the pixels.</p>"
    return f"{agree}<table><tr><th>class</th>{head}</tr>{''.join(rows)}</table>"


def scale() -> str:
    """Return HTML: which colour stands for which confidence."""
    steps = [matplotlib.colors.to_hex(matplotlib.colormaps["viridis"](i / 8)) for i in range(9)]
    return (
        f'<div class="scale" style="background: linear-gradient(90deg, {", ".join(steps)})"></div>'
        f'<div class="ends"><span>confidence 0</span><span>1</span></div>'
    )


def readable(name: str) -> str:
    """Return `student_1` as `student 1`."""
    return name.replace("_", " ")


def build(viewer: Viewer, examples: list[str]) -> gr.Blocks:
    """Return the page: an image in, two columns of pictures and the legend out."""
    teachers = [name for name in viewer.names if name.startswith("teacher")]
    chosen = [viewer.names[0], *teachers[:1]]  # side by side
    page: gr.Blocks
    with gr.Blocks(
        title="ctt", analytics_enabled=False, delete_cache=(3600, 3600), fill_width=True
    ) as page:
        gr.HTML(heading(viewer))
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = upload()
                if examples:
                    gr.Examples(examples, image, label=f"evaluation images of {viewer.info.name}")
            with gr.Column(scale=1, min_width=280):
                opacity = gr.Slider(0, 1, OVERLAY, label="opacity of the overlay")
                table = gr.HTML(legend([], [], viewer.info), elem_id="legend")
        choices = [(readable(name), name) for name in viewer.names]
        pictures: list[list[gr.Image]] = [[] for _ in chosen]
        with gr.Row():
            networks = [
                gr.Dropdown(
                    choices,
                    value=name,
                    show_label=False,
                    min_width=130,
                    elem_id=f"network-{number}",
                )
                for number, name in enumerate(chosen)
            ]
        for kind in ("overlay", "mask", "confidence"):
            with gr.Row():
                for number, column in enumerate(pictures):
                    column.append(image_box(kind, f"{kind}-{number}"))
        gr.HTML(scale())
        inputs = [image, opacity, *networks]
        outputs = [*chain(*pictures), table]
        changes = [image.change, *(network.change for network in networks)]
        gr.on(changes, viewer.show, inputs, outputs, show_progress="minimal")
        opacity.release(viewer.show, inputs, outputs, show_progress="hidden")
        ranking(viewer)
    return page


def heading(viewer: Viewer) -> str:
    """Return HTML: which networks these are."""
    facts = (
        viewer.trained.origin,
        f"{viewer.info.name}, {len(viewer.info.classes)} classes",
        f"protocol {protocol_text(viewer.settings)}",
    )
    lines = " &middot; ".join(map(html.escape, facts))
    return f'<div class="head"><h1>What the network sees</h1><p>{lines}</p></div>'


def image_box(kind: str, elem_id: str) -> gr.Image:
    return gr.Image(
        label=kind,
        interactive=False,
        format="png",
        buttons=["download", "fullscreen"],
        min_width=130,  # two fit beside each other on a telephone
        elem_id=elem_id,
        elem_classes="picture",
    )


class OnlyFromHere:
    """ASGI middleware: every answer tells the browser to load nothing from other machines."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message["headers"] = [*message.get("headers", []), policy]
            await send(message)

        await self.app(scope, receive, send_with_policy)


@dataclass(frozen=True)
class Limits:
    """Who may see the page, and what it takes.

    Attributes:
        password: of the user `ctt`; empty: none is needed.
        largest_upload: megabytes of an image.
    """

    password: str
    largest_upload: int


def serve(viewer: Viewer, host: str, port: int, browser: bool, limits: Limits) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: the port is taken, or the address is not one of this machine.
    """
    system = ("system-ui", "sans-serif")
    with tempfile.TemporaryDirectory() as folder:
        page = build(viewer, viewer.examples(Path(folder)))
        try:
            page.launch(
                server_name=host,
                server_port=port,
                inbrowser=browser,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                footer_links=[],
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                run_history=False,
                auth=(USER, limits.password) if limits.password else None,
                max_file_size=limits.largest_upload * MEGABYTE,
                allowed_paths=[folder],
                theme=gr.themes.Base(font=system, font_mono=("ui-monospace", "monospace")),
                css=CSS,
                app_kwargs={"middleware": [Middleware(OnlyFromHere)]},
            )
        except OSError as error:
            raise UserError(
                f"--port {port}: nothing can be served at {host} there ({error}). Give another "
                f"--port."
            ) from None
        print(f"The page is at http://{host}:{port} - end with Ctrl-C", flush=True)
        page.block_thread()
