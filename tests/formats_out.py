"""What each format costs that a model can go out in: log-probs of a fixed text against its own.

uv run python tests/formats_out.py                        # prints the table of docs/serving.md
uv run python tests/formats_out.py outputs/smollm2/final  # the same for another model
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hf_layout import convert, reported  # noqa: E402

FORMATS = {
    "MLX, as it is": (),
    "MLX, 8 bits": ("-q", "--bits", "8"),
    "MLX, 4 bits": ("-q",),
    "GGUF f32": ("--to", "gguf", "--gguf-type", "f32"),
    "GGUF f16": ("--to", "gguf", "--gguf-type", "f16"),
    "GGUF bf16": ("--to", "gguf", "--gguf-type", "bf16"),
    "GGUF q8_0": ("--to", "gguf", "--gguf-type", "q8_0"),
}
HEAD = "| format | bits per weight | mean | largest |"


def table(source=ROOT / "models/tiny-math"):
    """Markdown: bits per weight, mean and largest difference of each format."""
    lines = [HEAD, "|---" * 4 + "|"]
    with tempfile.TemporaryDirectory() as name:
        for label, words in FORMATS.items():
            place = Path(name) / label.replace(" ", "-")
            code, out, err = convert("--hf-path", source, *words, "--output-dir", place)
            assert code == 0, err
            mean, largest, bits = reported(out)
            lines.append(f"| {label} | {bits:.1f} | {mean:.2g} | {largest:.2g} |")
    return "\n".join(lines)


if __name__ == "__main__":
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    print(table(*sys.argv[1:]))
