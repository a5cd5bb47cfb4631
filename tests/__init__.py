"""Tests. A package only so that `from tests.conftest import require` means this folder and no other."""
