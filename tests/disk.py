"""Every file operation of this process below a folder, numbered; at one of them something happens.

Python's own calls are patched where they are made, and the two libraries in Rust that write files,
safetensors and tokenizers, at their entrances. A write is two operations, before it and half-way.
"""

import builtins
import errno
import io
import os
import signal

import safetensors.torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

CHANGING = os.O_CREAT | os.O_WRONLY | os.O_RDWR
NAMES = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "truncate", "fsync", "link")
GROWING = {
    "open",
    "write",
    "half",
    "mkdir",
    "rename",
    "replace",
    "fsync",
    "safetensors",
    "tokenizer",
}
FULL = "No space left on device"


def kill(name):
    """Die as under SIGKILL at the worst moment."""
    os.kill(os.getpid(), signal.SIGKILL)


class Operations:
    """Patches of one process: `act(name)` is called at operation number `at`, or `every` later one.

    Attributes:
        names: Kind of each operation so far.
    """

    def __init__(self, folder, act=kill, at=0, *, every=False):
        self.folder, self.act, self.at, self.every = str(folder), act, at, every
        self.names, self._undo = [], []

    def point(self, name):
        self.names.append(name)
        if self.at and (len(self.names) == self.at or (self.every and len(self.names) > self.at)):
            self.act(name)

    def _below(self, path):
        if isinstance(path, int):
            return True
        return os.path.abspath(os.fsdecode(path)).startswith(self.folder)

    def _patch(self, place, name, new):
        self._undo.append((place, name, getattr(place, name)))
        setattr(place, name, new)

    def __enter__(self):
        real_open, real_os_open = builtins.open, os.open

        def opened(path, mode="r", *args, **options):
            if set(mode) & set("wax+") and self._below(path):
                self.point("reopen" if os.path.exists(path) else "open")
                return _File(real_open(path, mode, *args, **options), self.point)
            return real_open(path, mode, *args, **options)

        def os_opened(path, flags, *args, **options):
            if flags & CHANGING and self._below(path):
                self.point("reopen" if os.path.exists(path) else "open")
            return real_os_open(path, flags, *args, **options)

        self._patch(builtins, "open", opened)
        self._patch(io, "open", opened)
        self._patch(os, "open", os_opened)
        for name in NAMES:
            self._patch(os, name, self._counted(name, getattr(os, name)))
        real_save = safetensors.torch.serialize_file

        def saved(tensors, path, *args, **options):
            self.point("safetensors")
            real_save(tensors, path, *args, **options)
            whole = os.path.getsize(path)
            content = real_open(path, "rb").read()
            with real_open(path, "wb") as file:  # half of it
                file.write(content[: whole // 2])
            self.point("safetensors")
            with real_open(path, "wb") as file:
                file.write(content)

        self._patch(safetensors.torch, "serialize_file", saved)
        real_tokenizer = PreTrainedTokenizerFast._save_pretrained

        def tokenizer_saved(*args, **options):
            self.point("tokenizer")
            return real_tokenizer(*args, **options)

        self._patch(PreTrainedTokenizerFast, "_save_pretrained", tokenizer_saved)
        return self

    def __exit__(self, *exception):
        while self._undo:
            setattr(*self._undo.pop())

    def _counted(self, name, real):
        def call(path, *args, **options):
            if self._below(path) or "dir_fd" in options:
                self.point(name)
            return real(path, *args, **options)

        return call


class _File:
    """A file whose writes are operations."""

    def __init__(self, file, point):
        self._file, self._point = file, point

    def write(self, content):
        self._point("write")
        half = len(content) // 2
        self._file.write(content[:half])
        self._file.flush()
        self._point("half")
        self._file.write(content[half:])
        return len(content)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()

    def __iter__(self):
        return iter(self._file)


def full(name):
    """Fail as the library that writes does on a full disk; deleting goes on."""
    if name not in GROWING:
        return
    if name == "safetensors":
        raise SafetensorError(f"Error while serializing: I/O error: {FULL} (os error 28)")
    if name == "tokenizer":
        raise Exception(f"{FULL} (os error 28)")
    raise OSError(errno.ENOSPC, FULL)
