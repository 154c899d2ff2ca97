"""Weights of encoders: from a given path, a cache folder, or a download."""

from pathlib import Path

from ..common.files import PathLike, cache_folder, download_file, sha256


def given_file(path: PathLike, what: str, digest: str | None = None) -> Path:
    """A file of weights that the user names.

    Raises ValueError where there is none, or one with another SHA-256, which is left alone.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no weights of {what} at {path}; check the path")
    if digest is not None and (got := sha256(path)) != digest:
        raise ValueError(
            f"{path} is not the file of {what}: it has SHA-256 {got}, not {digest}; pass a whole "
            "copy of that file"
        )
    return path


def find_weights(given: PathLike | None, what: str, url: str, digest: str) -> Path:
    """The file of `what`'s weights: `given`, that of the cache folder, or a download into it.

    digest: its SHA-256. A file in the cache folder with another one is kept as NAME.wrong and never
    used. Raises ValueError for a given file that isn't the right one, OSError where the download
    fails.
    """
    if given is not None:
        return given_file(given, what, digest)
    path = cache_folder() / url.rsplit("/", 1)[-1]
    try:
        return Path(download_file(path, url, digest))
    except OSError as error:
        raise OSError(
            f"can't download the weights of {what} from {url} ({error}): connect to the network, "
            f"put them into {path}, or pass the path of a copy as weights"
        ) from error
