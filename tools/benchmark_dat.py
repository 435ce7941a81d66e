"""Time and peak memory of a forward pass of DAT, without gradients.

    python tools/benchmark_dat.py --size 800 1333
    python tools/benchmark_dat.py --version pp --arch small --backend auto --threads 2

Each backend of deformable attention makes a row. Memory is what a pass needs at its peak beyond
weights and image, results included: on the CPU what the operating system counts for the process.
"""

import argparse

import torch
from torch import nn

from mmdeform.analysis.benchmark.measure import extra_bytes, interleave, make_clock
from mmdeform.models import DAT


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="tiny", choices=("tiny", "small", "base"))
    parser.add_argument("--version", default="v1", choices=("v1", "pp"))
    parser.add_argument("--backend", nargs="+", default=["auto", "reference"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--size", type=int, nargs=2, default=(800, 1333), metavar=("HEIGHT", "WIDTH")
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="of the CPU; default: as torch chooses")
    parser.add_argument("--repeats", type=int, default=3, help="samples per time (default: 3)")
    return parser.parse_args(argv)


def peak_bytes(model: nn.Module, image: torch.Tensor) -> int | None:
    """Peak memory of a pass beyond weights and image; None where it cannot be measured."""

    def call(image: torch.Tensor = image) -> list[torch.Tensor]:
        with torch.no_grad():
            model(image)
        return []  # results count, too

    call(image[..., :64, :64])  # what is kept for ever
    return extra_bytes(call, image.device)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    torch.manual_seed(0)
    image = torch.randn(args.batch, 3, *args.size, device=device)
    models = {}
    for backend in args.backend:
        model = DAT(args.arch, args.version, backend=backend).eval().to(device)
        if models:
            model.load_state_dict(next(iter(models.values())).state_dict())
        models[backend] = model
    calls = {name: torch.no_grad()(lambda m=model: m(image)) for name, model in models.items()}
    samples = interleave(calls, args.repeats, make_clock(device))
    height, width = args.size
    print(
        f"DAT {args.version} {args.arch}, {args.batch} x 3 x {height} x {width}, {args.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for name, model in models.items():
        peak = peak_bytes(model, image)
        memory = "unknown" if peak is None else f"{peak / 1e6:.0f} MB"
        print(f"{name:10} {min(time for time, _ in samples[name]):8.3f} s  {memory:>10}")


if __name__ == "__main__":
    main()
