"""``python -m lora_exp.export.reading ORDER``: an export is loaded in its runtime, in this fresh process, and answers.

ORDER is JSON: ``format``, ``folder``, ``question`` (a safetensors file with ``tokens``), ``answer`` (the file to write
``logits`` to), ``base``, ``device``, ``plugins``. It ends early when its stdin does, which whoever asks holds open.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

from lora_exp.errors import UserError
from lora_exp.export.format import formats
from lora_exp.plugins import import_plugins


def main() -> None:
    order = json.loads(sys.argv[1])
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    import_plugins(order["plugins"], Path.cwd())
    from safetensors.torch import load_file, save_file

    tokens = load_file(order["question"])["tokens"].to(order["device"])
    base = Path(order["base"]) if order["base"] else None
    try:
        logits = formats[order["format"]]().logits(Path(order["folder"]), tokens, base)
    except UserError as error:
        sys.exit(str(error))
    save_file({"logits": logits.detach().cpu().float().contiguous()}, order["answer"])


def _end_with_stdin() -> None:
    """One that is killed leaves nobody to answer, and a folder that the next export clears away."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main()
