"""Export adapters without their base, as Hugging Face's `peft` stores them."""

import os
from pathlib import Path

from safetensors import SafetensorError

from maxlm.checkpoint.load import load_adapters
from maxlm.errors import CheckpointError, ConfigError
from maxlm.interop.peft import is_peft, write_peft
from maxlm.runtime.manifest import write_manifest
from maxlm.runtime.output import check_output, replaced_folder, temporary_name


def export_adapters(run: str | os.PathLike, output: str | os.PathLike, *, ema: bool = False) -> None:
    """Write the adapters of a run, atomically.

    Args:
      run: a run folder or a checkpoint.
      output: a new folder, or an earlier export of adapters, which is replaced.
      ema: the EMA weights instead of the weights.

    Raises:
      CheckpointError: the run has no adapters, or peft has none of their kind; writing to disk failed.
      ConfigError: `output` contains something else.
    """
    check_output(output, "export", key="OUTPUT", suffix=len(temporary_name("")))
    output = Path(os.path.abspath(output))
    if output.exists() and not is_peft(output) and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError([f"{output}: exists and is not a folder of peft; give a new folder"])
    adapted = load_adapters(run, ema=ema)
    try:
        with replaced_folder(output) as temporary:
            write_peft(temporary, adapted.base, adapted.adapters, adapted.config)
            write_manifest(
                temporary,
                stage="export/peft",
                inputs={"model": Path(run)},
                config={"ema": ema, "adapters": adapted.config.model_dump(mode="json")},
                metrics={},
            )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{output}: could not be written: {error}; free disk space and run again") from error
