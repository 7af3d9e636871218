"""``python -m rfkernels``: what is here, a demonstration, training of its model, videos from text, and benchmarks."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
from pathlib import Path

import torch

import rfkernels as rf
from rfkernels import native, toolchain
from rfkernels.tools import demo, extras_folder, generate
from rfkernels.tools.tiny import command as train


def info(args: argparse.Namespace) -> int:
    rows = {
        "rfkernels": rf.__version__,
        "imported from": str(Path(rf.__file__).parent),
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'not built in'})",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use",
        "triton": "installed" if importlib.util.find_spec("triton") else "not installed",
        "nvcc": toolchain.find_nvcc() or "none found",
    }
    if (build := native.build) is not None:
        rows["compiled kernels"] = (
            f"CPU, by {build.compiler}, built against torch {build.torch_version}, for torch >= {build.torch_target}"
        )
        rows["CUDA kernels"] = (
            f"CUDA {build.cuda}, for {build.cuda_architectures}, attention with head_dim {build.cuda_head_dims}"
            if build.cuda
            else f"none: {build.cuda_reason}"
        )
    else:
        rows["compiled kernels"] = f"none: {native.missing}"
    for name, text in rows.items():
        print(f"{name:18} {text}")
    print("\nbackends")
    for name, text in rf.explain_backends().items():
        print(f"  {name:22} {text}")
    return 0


def _bench(parser: argparse.ArgumentParser) -> None:
    """benchmarks/ is no part of the package: it lies beside it in a source tree, and in rfkernels-extras."""
    root = Path(__file__).parents[1]
    if (root / "benchmarks" / "command.py").is_file():
        sys.path.insert(0, str(root))
        from benchmarks import command
    elif extras_folder("benchmarks") is not None:
        from rfkernels_extras.benchmarks import command
    else:
        missing = "bench: this install lacks benchmarks/: they are in the source tree and the package rfkernels-extras"
        parser.set_defaults(run=lambda args: sys.exit(missing))
        return
    command.add_arguments(parser)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rfkernels", description=rf.__doc__)
    parser.add_argument("--version", action="version", version=f"rfkernels {rf.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, backends, and why what is missing is missing").set_defaults(run=info)
    demo.add_arguments(commands.add_parser("demo", help="stream a minute of video from the small model"))
    generate.add_arguments(commands.add_parser("generate", help="text to a video file, from a folder of weights"))
    train.add_arguments(commands.add_parser("train", help="train the small model that the demo streams"))
    _bench(commands.add_parser("bench", help="how fast each operation is here, beside what one would use instead"))
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(f"\nstopped{': ' + args.left(args) if 'left' in args else ''}", file=sys.stderr)
        return 130  # 128 and the signal's number, as shells have it
    except BrokenPipeError:
        # Who read the output has enough (`| head`). What is still buffered must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a disk that is full, a file that has gone
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
