"""What a chat template is told of thoughts: whether to think and how much, and what was thought before."""

from __future__ import annotations

from typing import Any

from kvarena.engine.server.forms.thoughts import EFFORT, SWITCHES, knows
from kvarena.engine.server.shared.errors import bad_request

_PAST = ("reasoning", "reasoning_content", "thinking")  # names of a message's thought, in requests and in templates


def switch_of(template: str) -> str | None:
    """The variable by which a template is told to think or not to, or None."""
    return next((name for name in SWITCHES if knows(template, name)), None)


def template_flags(req: Any, template: str, flags: dict[str, Any]) -> dict[str, Any]:
    """The variables that a template gets.

    Args:
        req: the request, with `reasoning_effort` and `enable_thinking` where it is a chat.
        template: as it is written.
        flags: the request's `chat_template_kwargs`, which come first.

    Raises:
        ApiError: something is asked for that the template does not look at.
    """
    unknown = [name for name, value in flags.items() if value and template and not knows(template, name)]
    if unknown:
        name = unknown[0][:100]
        raise bad_request(f"chat_template_kwargs.{name} is nothing that this model's chat template knows",
                          "chat_template_kwargs")  # fmt: skip
    effort, thinks = getattr(req, "reasoning_effort", None), getattr(req, "enable_thinking", None)
    made: dict[str, Any] = {}
    switch = switch_of(template)
    if thinks is not None and switch is not None:
        made[switch] = thinks
    elif thinks:
        raise bad_request("enable_thinking is nothing that this model's chat template knows", "enable_thinking")
    if effort and knows(template, EFFORT) and not (effort == "none" and switch is not None):
        made[EFFORT] = effort
    elif effort and switch is not None:
        made.setdefault(switch, effort != "none")
    elif effort and effort != "none":
        raise bad_request("reasoning_effort is nothing that this model's chat template knows", "reasoning_effort")
    return made | flags


def adapt_message(message: dict[str, Any], template: str) -> None:
    """Give a message the names that a template knows, for what was thought and for who speaks."""
    thought = next((message[name] for name in _PAST if isinstance(message.get(name), str)), None)
    if thought is not None:
        message.setdefault("reasoning_content", thought)
        if "message.thinking" in template or "message['thinking']" in template:
            message.setdefault("thinking", thought)
    if message.get("role") == "developer" and "developer" not in template:
        message["role"] = "system"
