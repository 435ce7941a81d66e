"""Measure how sparse the attention of a detector is, over the checkpoints of its training.

    python tools/attention_sparsity.py CONFIG WORK_DIR --images 20 --out sparsity.png
    python tools/attention_sparsity.py CONFIG epoch_1.pth epoch_12.pth --layers "decoder.**"

For each checkpoint (WORK_DIR stands for its epoch_*.pth and iter_*.pth), attention layer and head:
the negative entropy of attention, averaged over the queries of the images, and the entropy as a
share of that of uniform attention, which can be compared between layers with different numbers of
keys. Dense attention and samples of deformable attention are measured alike. Images are the first
ones of the validation set, or of the test set, prepared by its pipeline, one at a time.

Writes curves over the epochs to OUT and all numbers to a JSON file of the same name.
"""

import argparse
import json
from pathlib import Path

from mmengine import DictAction
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import mmdeform  # noqa: F401  (configs may inherit from mmdeform::)
from mmdeform.analysis.attention import attention_layers
from mmdeform.analysis.attention.checkpoints import find_checkpoints, order_checkpoints
from mmdeform.analysis.attention.drawing import draw_sparsity
from mmdeform.analysis.attention.run import MEASURES, CheckpointSparsity, measure_run, summary
from mmdeform.analysis.detectors import build_dataset, build_detector


def table_of(measured: CheckpointSparsity) -> Table:
    """The layers with the weights of one checkpoint."""
    table = Table(title=f"attention with {measured.checkpoint.path.name}")
    table.add_column("layer", overflow="fold")
    table.add_column("kind", no_wrap=True)
    for name in ("queries", "keys n", "negative\nentropy", "entropy\n/ log n"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, layer in measured.layers.items():
        keys = sorted({layer.fewest_keys or 0, layer.most_keys or 0})
        table.add_row(
            name,
            layer.kind,
            str(layer.queries),
            " - ".join(map(str, keys)),
            f"{layer.mean.negative_entropy:.3f}",
            f"{layer.mean.normalised_entropy:.3f}",
        )
    return table


def measure(args: argparse.Namespace) -> list[CheckpointSparsity]:
    """Does what the top of this file says. Returns what it measured."""
    model = build_detector(args.config, args.device, args.cfg_options)
    attention_layers(model, args.layers)  # an error before anything is read
    checkpoints = order_checkpoints(find_checkpoints(args.checkpoints), model)
    dataset = build_dataset(model.cfg, args.data)
    if not 1 <= args.images <= len(dataset):
        raise ValueError(
            f"the number of images must be between 1 and {len(dataset)}, all that the {args.data} "
            f"set has, but got {args.images}"
        )
    names = [str(dataset.get_data_info(index)["img_path"]) for index in range(args.images)]
    samples = [dataset[index] for index in range(args.images)]
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measure", total=len(checkpoints) * len(samples))
        measured = measure_run(
            model, checkpoints, samples, args.layers, lambda: progress.advance(task)
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw_sparsity(measured).savefig(args.out, dpi=200)
    report = {
        "config": str(args.config),
        "data": args.data,
        "images": names,
        "measures": MEASURES,
        "checkpoints": summary(measured),
    }
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure how sparse attention is over the checkpoints of a training.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("config", type=Path)
    parser.add_argument(
        "checkpoints", type=Path, nargs="+", help="checkpoints, or folders that hold those of a run"
    )
    parser.add_argument("--images", type=int, default=20, help="number of images")
    parser.add_argument("--data", choices=("val", "test"), default="val", help="data set")
    parser.add_argument("--layers", nargs="+", default=["**"], help="patterns of names of layers")
    parser.add_argument("--out", type=Path, default=Path("sparsity.png"), help="picture to write")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="changes of the config")
    args = parser.parse_args()
    if not args.config.is_file():
        parser.error(f"{args.config} does not exist")
    try:
        measured = measure(args)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    Console().print(table_of(measured[-1]))
    print(f"{len(measured)} checkpoints: {args.out} and {args.out.with_suffix('.json')} written")


if __name__ == "__main__":
    main()
