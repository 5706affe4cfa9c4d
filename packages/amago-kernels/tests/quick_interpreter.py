"""Triton's interpreter, several times faster: it prepares Triton's modules once, not at every call of a function."""

from __future__ import annotations

from amago_kernels.dispatch import INTERPRETING


def hurry(monkeypatch) -> None:
    """For one test; does nothing where kernels run for real."""
    if not INTERPRETING:
        return
    from triton.runtime import interpreter

    prepare, prepared = interpreter._patch_lang, set()

    def call(self, *args, **kwargs):
        # What the kernel's own module needs is prepared where the kernel begins.
        module = self.fn.__module__
        if module.startswith("triton.") and module not in prepared:
            prepared.add(module)
            prepare(self.fn)
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
