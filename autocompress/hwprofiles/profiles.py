"""Where profiles live: files of this package, and those a user measured."""

from __future__ import annotations

from pathlib import Path

from autocompress.errors import UnknownName, UsageError
from autocompress.files import cache_dir
from autocompress.hwprofiles.profile import HardwareProfile

SHIPPED = Path(__file__).parent / "data"


def measured_folder() -> Path:
    """The folder of the user's own profiles: ``profiles`` in ``AUTOCOMPRESS_HOME`` or the cache folder."""
    return cache_dir() / "profiles"


def known_profiles() -> dict[str, Path]:
    """Name -> file of every shipped and measured profile; a measured one hides a shipped one of its name."""
    return {path.stem: path for folder in (SHIPPED, measured_folder()) for path in sorted(folder.glob("*.json"))}


def load_profile(name_or_path: str | Path) -> HardwareProfile:
    """A profile by name, or from a file (anything that ends in ``.json`` or has a folder in it).

    Raises ``UnknownName`` for a name nobody has measured, ``UsageError`` for an unusable file.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.endswith(".json") or Path(text).name != text:
        return HardwareProfile.load(name_or_path)
    known = known_profiles()
    if text not in known:
        raise UnknownName("profile", text, known, "Measure one with 'autocompress profile measure'.")
    return HardwareProfile.load(known[text])


def save_profile(profile: HardwareProfile, path: Path | str | None = None) -> Path:
    """Write a profile to ``path``, or under its name into the folder of measured ones; returns the file."""
    if path is None:
        if Path(profile.name).name != profile.name or not profile.name or profile.name.startswith("."):
            raise UsageError(
                f"A profile's name becomes a file's name, {profile.name!r} cannot; use letters and digits."
            )
        path = measured_folder() / f"{profile.name}.json"
    profile.save(path)
    return Path(path)
