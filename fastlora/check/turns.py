"""Who speaks when."""

from __future__ import annotations

from fastlora.data.format import Chat

_MAY_FOLLOW = {
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"tool", "assistant", "user"},
}


def order_fault(chat: Chat) -> str | None:
    """What is wrong with the order of a conversation's turns; None if nothing is."""
    roles = [turn["role"] for turn in chat.messages]
    places = iter(enumerate(roles, start=1))
    before = None
    for place, role in places:
        if role in ("system", "developer"):
            if before is not None:
                return f"message {place} is {role}'s, after a turn of {before}"
        elif before is None:
            if role != "user":
                return f"message {place}, the first, is {role}'s"
            before = role
        elif role not in _MAY_FOLLOW[before]:
            return f"message {place} is {role}'s, after a turn of {before}"
        else:
            before = role
    if before != "assistant":
        return f"the last message is {before}'s"
    return None
