"""What several tests share, by topic."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
