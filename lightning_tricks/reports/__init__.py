"""What runs logged, as one page that needs no server: tables, pictures, and what was missing."""

from lightning_tricks.reports.build import report

__all__ = ["report"]
