"""The version, where modules of any layer can read it; and those of other packages."""

__version__ = "0.1.0"


def versions(*packages: str) -> dict[str, str]:
    """Package → version, of those that are installed.

    Example:
        >>> list(versions("moe-compose", "no-such-package"))  # doctest: +SKIP
        ['moe-compose']
    """
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
