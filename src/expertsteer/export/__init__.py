"""Packs for other programs, and other programs' vectors as packs."""

from expertsteer.export.exporting import FORMATS, Exported, ExportFormat, export_pack, written_files
from expertsteer.export.importing import READERS, import_pack

__all__ = [
    "FORMATS",
    "READERS",
    "ExportFormat",
    "Exported",
    "export_pack",
    "import_pack",
    "written_files",
]
