"""Asking an address that a stranger gave, without being led into a network of ours.

Whoever gives a URL may point it at this machine, its neighbours or the cloud's metadata, directly,
by a name that resolves there, or by a redirect. So every hop is parsed strictly, its name resolved
by us, refused if any of its addresses is not public, and connected to by the address that was
checked. No proxy is taken from the environment, which would resolve the name anew. Answers are
bounded in bytes, decoded ones too, and in seconds. Left out: what else could reach the network for
a stranger; nothing does, since only bytes are passed on.
"""

from wanfit.fetch.download import Answer, Limits, download, fetch_image, post
from wanfit.fetch.guard import PORTS, Guard, Target, parse_allowed

__all__ = [
    "PORTS",
    "Answer",
    "Guard",
    "Limits",
    "Target",
    "download",
    "fetch_image",
    "parse_allowed",
    "post",
]
