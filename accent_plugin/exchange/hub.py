"""A bundle -> a repository on the Hugging Face Hub."""

from pathlib import Path

import accent_plugin
from accent_plugin.errors import BundleError


def push(folder, repo, *, private=True, token=None, endpoint=None, message=None, check=None):
    """Upload a bundle, after checking that it is whole.

    Hidden files stay here. Files that the repository has and the bundle has not stay there.

    Arguments
    ---------
    folder : str or Path
        The bundle.
    repo : str
        "NAME" or "NAMESPACE/NAME"; made where it does not exist.
    private : bool
        Whether a new repository is private. With True, one that exists and is public is refused.
    token : str, or None
        With permission to write; by default what `hf auth login` or HF_TOKEN left.
    endpoint : str, or None
        Of another server than the Hub's own, or than HF_ENDPOINT says.
    message : str, or None
        Of the commit.
    check : callable, or None
        Folder -> raises BundleError where it is no whole bundle; `accent_plugin.bundle.load.check_bundle` by default.

    Returns
    -------
    url : str
        Of the repository.

    Raises
    ------
    BundleError
        When the folder is no bundle, the name is none, there is no token, or the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import validate_repo_id

    folder = Path(folder)
    if check is None:
        from accent_plugin.bundle.load import check_bundle as check
    check(folder)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise BundleError(f"{repo!r} cannot be a repository's name: {error}\ngive NAME or NAMESPACE/NAME") from None
    token = token or get_token()
    if not token:
        raise BundleError(
            f"no token for the Hub: nothing of {folder} was uploaded\n"
            f"log in with `hf auth login`, or set HF_TOKEN to a token that may write (see the settings of your account)"
        )
    api = HfApi(endpoint=endpoint, token=token)
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(url.repo_id).private:
            raise BundleError(
                f"{url} exists and is public, and this upload was to be private: nothing was uploaded\n"
                "choose another name, or say that it may be public"
            )
        api.upload_folder(
            folder_path=folder,
            repo_id=url.repo_id,
            commit_message=message or f"Bundle of accent_plugin {accent_plugin.__version__}",
            ignore_patterns=[".*", "**/.*"],
        )
    except OfflineModeIsEnabled:
        raise BundleError(f"{api.endpoint} is not asked while HF_HUB_OFFLINE is set: unset it to upload") from None
    except HfHubHTTPError as error:
        raise BundleError(_refused(error, api.endpoint, repo)) from error
    except (HTTPError, OSError) as error:
        raise BundleError(
            f"{api.endpoint} cannot be reached: {error or type(error).__name__}\n"
            "check the network and run the same command again: what has arrived is not sent twice"
        ) from error
    except ValueError as error:
        raise BundleError(f"the Hub does not take {folder}: {error}") from error
    return str(url)


def _refused(error, endpoint, repo):
    status = error.response.status_code
    said = error.server_message or str(error).strip().splitlines()[0]
    remedies = {
        401: "the token is wrong or has expired: log in with `hf auth login`, with one that may write",
        403: "this token may not write there: is the namespace yours, and has the token the role write?",
        404: "is the name right, and may this token see the repository?",
    }
    return f"{endpoint} refused {repo} with {status}: {said}\n{remedies.get(status, 'try again later')}"
