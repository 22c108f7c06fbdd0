"""Prepare a DatasetDict of accented English, such as one made from Common Voice, for this recipe.

``accent_plugin.data.prepare`` does the work; its ``PreparationChoices`` document every argument.
"""

from pathlib import Path

from accent_plugin.data.manifests import load_prepared
from accent_plugin.data.prepare import default_prepared_folder, prepare_data

PROJECT = Path(__file__).resolve().parents[2]


def prepare_common_voice_accent(
    data_folder, prepared_folder=None, skip_prep=False, workers=None, progress=True, **choices
):
    """Make 16 kHz clips and the CSV manifests of train, valid and test, unless they exist.

    Arguments
    ---------
    data_folder : str or Path
        A DatasetDict saved with ``save_to_disk``. It is not modified.
    prepared_folder : str or Path, optional
        Folder for clips and manifests; by default ``data/prepared/<fingerprint of source and arguments>``.
    skip_prep : bool
        Use ``prepared_folder`` unchanged and ignore the other arguments.
    workers : int, optional
        Number of decoding processes; None uses one per core.
    progress : bool
        Whether to draw a progress bar on stderr.
    **choices
        Fields of ``accent_plugin.data.prepare.PreparationChoices``: accents, seed, balance, ...

    Returns
    -------
    accent_plugin.data.manifests.Prepared

    Raises
    ------
    accent_plugin.errors.DataError
        If the data cannot be used, or ``prepared_folder`` was made from other data or arguments.
    """
    if skip_prep:
        return load_prepared(prepared_folder)
    folder = prepared_folder or default_prepared_folder(data_folder, PROJECT / "data" / "prepared", **choices)
    return prepare_data(data_folder, folder, workers=workers, progress=progress, **choices)
