"""Fine-tune wav2vec 2.0 and related speech encoders to classify English accents, with SpeechBrain."""

__version__ = "0.2.0"


def lazy_names(package, homes):
    """Make the `__getattr__` of a package that imports names on first access; `homes` is {name: defining module}."""
    import importlib

    def find(name):
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    return find


def _name_unsupported():
    """Warn about installed versions that setup.py does not allow; pip warns only during installation."""
    import importlib.metadata
    import warnings

    from packaging.requirements import Requirement

    try:
        required = importlib.metadata.requires(__name__) or ()
    except importlib.metadata.PackageNotFoundError:
        # The package is a checkout and not installed.
        return
    for requirement in map(Requirement, required):
        if requirement.name not in ("speechbrain", "transformers", "datasets") or requirement.marker is not None:
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            message = f"{__name__} {__version__} is tested with {requirement}, and {found} is installed"
            warnings.warn(message, stacklevel=3)


_name_unsupported()
