"""Where tasks keep what they decoded or trained; the folder itself belongs to :mod:`autocompress.files`."""

from __future__ import annotations

from autocompress.files import cache_dir

__all__ = ["cache_dir"]
