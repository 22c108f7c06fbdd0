"""Whether what a folder holds was made from the source and arguments that are asked for now."""

from accent_plugin.data import dataset_dict
from accent_plugin.errors import ManifestError


def require_same(folder, made, asked, *, option, in_part, contents=None):
    """Refuse a folder that was made from something else.

    Arguments
    ---------
    folder : Path
    made, asked, contents
        As in ``differences``.
    option : str
        The argument that names the folder, for the message.
    in_part : bool
        Whether the folder is unfinished.

    Raises
    ------
    ManifestError
        With one line for each difference.
    """
    if lines := differences(made, asked, contents):
        raise ManifestError(
            f"{folder} was made {'(in part) ' if in_part else ''}from something else:\n"
            + "\n".join(f"  {line}" for line in lines)
            + f"\nchoose another {option}, give the old values, or remove that folder"
        )


def differences(made, asked, contents=None):
    """One line for each argument, source or file that differs, old -> new.

    Arguments
    ---------
    made, asked : dict
        ``arguments`` and ``source``, ``data_folder`` where that, not the source's name, is what the user gave, and in
        `made`, ``contents``, a digest of each file.
    contents : callable, optional
        Returns ``contents`` of the source that is asked for. A copy of a source has other times: it is called if only
        they differ.
    """
    old, new = made.get("arguments", {}), asked["arguments"]
    lines = [f"{key}: {show_value(old.get(key))} -> {show_value(new[key])}" for key in new if old.get(key) != new[key]]
    before, now = made.get("source", {}), asked["source"]
    if before == now:
        return lines
    if contents and made.get("contents") and without_times(before) == without_times(now):
        if made["contents"] == contents():
            return lines
    option = "data_folder" if "data_folder" in asked else "source"
    old_name, new_name = (given.get("data_folder") or given.get("source", {}).get("name") for given in (made, asked))
    if old_name != new_name:
        return [*lines, f"{option}: {old_name} -> {new_name}"]
    then, now = (source.get("files") or source.get("splits") or {} for source in (before, now))
    changed = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    return [*lines, f"contents of {new_name}: changed since ({', '.join(changed) or dataset_dict.CARD_JSON})"]


def without_times(source):
    """The fingerprint of a DatasetDict with the sizes of its files only."""
    splits = {
        name: split | {"files": {file: size for file, (size, _) in split["files"].items()}}
        for name, split in source.get("splits", {}).items()
    }
    return source | {"splits": splits}


def show_value(value):
    """Show an argument as it is typed."""
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
