"""What all tests of this folder share."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_wait(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a disk may take 10 ms for each
