"""Merge adapters, mlx-lm's or PEFT's, into the model that they were trained on."""

import shutil
from pathlib import Path

from . import fingerprints, hf_config, ollama, served_prompt
from .adapters import check_base, put_on
from .loading import LoadedModel
from .writing import write_fused


def fuse(base: Path, adapters: Path, out: Path, said: tuple[str, str], trust: bool) -> None:
    """Write the model of `base` with the adapters merged into it, at full precision, to `out`.

    said: model and adapters as the user gave them.

    Raises:
        UserError: damaged adapters, or those of another model.
    """
    import mlx_lm

    model, tokenizer, config = mlx_lm.load(
        str(base),
        tokenizer_config={"trust_remote_code": trust},
        model_config=hf_config.translate_config(mlx_lm.utils.load_config(base)),
        return_config=True,
        trust_remote_code=trust,
    )
    check_base(adapters, said[1], said[0], fingerprints.of_model(base))
    adapter_config, kind = put_on(model, adapters, said[1], said[0])
    model.eval()
    loaded = LoadedModel(model, tokenizer, config, base, kind, adapter_config=adapter_config)
    trained = served_prompt.settings_in(adapters)
    stops = trained["stop_strings"] if "stop_strings" in trained else ollama.stops(base)
    out.mkdir(parents=True)
    write_fused(out, loaded, model, stops)
    carry_prompt(base, out)
    carry_prompt(adapters, out)  # how the adapters were trained to be asked comes first


def carry_prompt(source: Path, out: Path) -> None:
    if (source / served_prompt.MARKER).is_file():
        served_prompt.carry_over(source, out)
        if (source / served_prompt.TEMPLATE).is_file():
            shutil.copyfile(source / served_prompt.TEMPLATE, out / served_prompt.TEMPLATE)
