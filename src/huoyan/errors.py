"""Every error a user can cause or must act on. Each message is one line: what is wrong, what to do.

`exit_code` is what the command line exits with; `http_status` is what a server answers.
"""

from __future__ import annotations


class HuoyanError(Exception):
    """Base of all errors meant for people. Anything else that escapes is a bug."""

    exit_code = 1
    http_status = 500


class InputError(HuoyanError, ValueError):
    """The request itself is wrong: a bad parameter, a prompt too long, a message without text."""

    exit_code = 2
    http_status = 400


class MediaError(InputError):
    """A picture or a video cannot be read: not found, not an image, truncated, too large."""


class ModelError(HuoyanError):
    """The checkpoint cannot be used: missing, incomplete, misshapen, of an unsupported version."""

    exit_code = 3
    http_status = 503


class CapacityError(HuoyanError):
    """The machine is too small for what is asked: memory of the card, blocks of the KV cache."""

    exit_code = 4
    http_status = 503


class UnsupportedError(HuoyanError, NotImplementedError):
    """An option that exists elsewhere and would change the result here; the message gives the way out."""

    exit_code = 2
    http_status = 400
