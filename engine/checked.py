"""Classes that others write, checked against the base that says what to write. Free of torch."""

from __future__ import annotations

import inspect
from abc import ABCMeta
from typing import Any

from kvarena.engine.errors import ConfigError


class Checked(ABCMeta):
    """The type of classes that others write: what one lacks is said in one line when an object of it is made.

    A base names in `_set_by_base` an attribute that its own constructor sets, if it must be called.
    """

    _set_by_base: str

    @property
    def __signature__(cls) -> inspect.Signature:
        """The constructor's, which this type's own call would hide."""
        made_by = inspect.signature(inspect.getattr_static(cls, "__init__"))
        return made_by.replace(parameters=list(made_by.parameters.values())[1:])

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make an object.

        Raises:
            ConfigError: a member is missing or of another shape, an option is unknown, or the base was not constructed.
        """
        where = f"{cls.__module__}.{cls.__qualname__}"
        for base in [base for base in cls.__mro__[::-1] if isinstance(base, Checked)]:
            for name, asked in vars(base).items():
                if not name.startswith("_") and (inspect.isfunction(asked) or isinstance(asked, property)):
                    cls._check_member(where, base, name, asked)
        try:
            inspect.signature(cls).bind(*args, **kwargs)
        except TypeError as error:
            raise ConfigError(f"{where}: {error}; it takes {inspect.signature(cls)}") from error
        base_is_made = f"call super().__init__(...) first in {where}.__init__, with all options that are not its own"
        try:
            made = super().__call__(*args, **kwargs)
        except AttributeError as error:
            if isinstance(error.obj, cls) and not hasattr(error.obj, cls._set_by_base):
                raise ConfigError(f"{error}; {base_is_made}") from error
            raise
        if cls._set_by_base and not hasattr(made, cls._set_by_base):
            raise ConfigError(f"{where} was made without its base; {base_is_made}")
        return made

    def _check_member(cls, where: str, base: type, name: str, asked: Any) -> None:
        """Whether `cls` has what `base` asks for as `name`, and it can be called alike."""
        own = inspect.getattr_static(cls, name)
        if own is asked and not getattr(asked, "__isabstractmethod__", False):
            return
        is_property = isinstance(asked, property)
        function = asked.fget if is_property else asked
        shape = f"def {name}{inspect.signature(function)}".replace("'", "")
        told = f"write `{'@property ' if is_property else ''}{shape}`: {inspect.getdoc(function)}".partition("\n")[0]
        told += f" ({base.__qualname__} in {base.__module__})"
        if getattr(own, "__isabstractmethod__", False):
            raise ConfigError(f"{where} lacks {', '.join(sorted(cls.__abstractmethods__))}; {told}")
        if inspect.isfunction(own) if is_property else isinstance(own, property):
            raise ConfigError(f"{where}.{name} must {'' if is_property else 'not '}be a property; {told}")
        if inspect.isfunction(own):
            arguments = [
                p for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
            ]
            for given in ([p for p in arguments if p.default is p.empty], arguments):
                try:
                    inspect.signature(own).bind(*given)
                except TypeError as error:
                    raise ConfigError(f"{where}.{name} is called with other arguments ({error}); {told}") from error
