"""See in a browser which tokens are kept: a page to ask questions about images with fewer visual tokens.

It shows the kept patches of a picture by group, why the others were dropped, and the answers of the full and the
compressed model side by side. The page is served to this machine alone, unless --host says otherwise.

Examples:
    prunesid app
    prunesid app --model llava-hf/llava-1.5-7b-hf --port 8080
"""

import argparse

from transformers.utils import logging


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="checkpoint of a supported family, or a variant (default: the embedded model)")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (default: %(default)s)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")


def run(arguments: argparse.Namespace) -> None:
    serve(arguments.model, arguments.host, arguments.port)


def serve(model: str | None, host: str, port: int | None) -> None:
    """Load a model, the embedded one by default, and serve its page until the process is stopped."""
    from prunesid_cli.app_model import AppModel
    from prunesid_cli.app_page import build, example_pictures, launch  # needs Gradio, which --help does not

    logging.disable_progress_bar()
    print("The model is being loaded ...", flush=True)
    launch(build(AppModel(model, example_pictures())), host, port)
