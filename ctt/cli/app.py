"""ctt-app: a page to look at what the networks of a run see in an image."""

from __future__ import annotations

import ipaddress
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ctt.cli.common import check_protocol, run_program
from ctt.errors import UserError
from ctt.settings import EvalSettings
from ctt.text import say

PASSWORD_VARIABLE = "CTT_APP_PASSWORD"


@dataclass(frozen=True)
class Arguments:
    """Show masks, overlays and confidence of images in a browser, two networks side by side.

    The page is served to this machine alone and loads nothing from elsewhere.
    """

    path: Path
    """Folder of a run (all students, teachers and their ensemble), or a best.safetensors."""
    port: int = 7860
    host: str = "127.0.0.1"
    """Address to serve at; 0.0.0.0 shows the page to everyone who reaches this machine. The
    environment variable CTT_APP_PASSWORD, if set, is the password of the user ctt."""
    largest_upload: int = 200
    """Largest image that the page takes, in megabytes."""
    open: bool = False
    """Also open a browser."""
    device: str = "auto"
    eval: EvalSettings = field(default_factory=EvalSettings)
    """How images are shown to the networks; by default as in the evaluations of the run."""


def main() -> None:
    """Run the program."""
    run_program("ctt-app", lambda: _main(sys.argv[1:]), extra="app")


def _main(arguments: list[str]) -> int:
    parsed = _parse(arguments, EvalSettings())
    if not 1 <= parsed.port < 2**16:
        raise UserError(f"--port {parsed.port} must be in 1..65535.")
    if parsed.largest_upload < 1:
        raise UserError(f"--largest-upload {parsed.largest_upload} must be at least 1.")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    from ctt.cli.page import Limits, Viewer, serve
    from ctt.device import pick_device
    from ctt.inference.load import load_trained
    from ctt.inference.predict import for_images

    device = pick_device(parsed.device, "--device")
    trained = load_trained(parsed.path)
    parsed = _parse(arguments, trained.settings.eval)
    check_protocol(parsed.eval, trained.settings.eval)
    password = os.environ.get(PASSWORD_VARIABLE, "")
    if not password and not is_this_machine(parsed.host):
        say(
            f"Warning: --host {parsed.host}: whoever reaches this machine sees the page. The "
            f"environment variable {PASSWORD_VARIABLE} sets a password.",
            sys.stderr,
        )
    viewer = Viewer(trained, device, for_images(parsed.eval))
    limits = Limits(password, parsed.largest_upload)
    serve(viewer, parsed.host, parsed.port, parsed.open, limits)
    return 0


def is_this_machine(host: str) -> bool:
    """Return whether what is served at the address is seen by programs of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _parse(arguments: list[str], protocol: EvalSettings) -> Arguments:
    import tyro

    default = Arguments(path=tyro.MISSING, eval=protocol)
    config = (tyro.conf.PositionalRequiredArgs,)
    return tyro.cli(Arguments, prog="ctt-app", args=arguments, default=default, config=config)
