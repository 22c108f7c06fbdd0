"""Upload a bundle to a repository on the Hugging Face Hub."""

from pathlib import Path

import accent_plugin
from accent_plugin.errors import BundleError


def push(folder, repo, *, private=True, token=None, endpoint=None, message=None, check=None):
    """Check and upload a bundle; return the address of the repository.

    Hidden files are not uploaded. Other files that are already in the repository are kept.

    Arguments
    ---------
    folder : str or Path
        The bundle.
    repo : str
        "NAME" or "NAMESPACE/NAME"; created if it does not exist.
    private : bool
        Whether a new repository is private. With True, an existing public repository is refused.
    token : str, or None
        Token with write permission; by default that of `hf auth login` or HF_TOKEN.
    endpoint : str, or None
        Address of the server; by default HF_ENDPOINT or the Hub.
    message : str, or None
        Commit message.
    check : callable, or None
        Raises BundleError unless a folder is an intact bundle; by default `accent_plugin.bundle.load.check_bundle`.

    Raises
    ------
    BundleError
        If the folder is not a bundle, the name is invalid, there is no token, or the Hub is unreachable or refuses.
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
        raise BundleError(f"{repo!r} is not a valid repository name: {error}\ngive NAME or NAMESPACE/NAME") from None
    token = token or get_token()
    if not token:
        raise BundleError(
            f"there is no token for the Hub: {folder} was not uploaded\n"
            "log in with `hf auth login`, or set HF_TOKEN to a token with write permission (see your account settings)"
        )
    api = HfApi(endpoint=endpoint, token=token)
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(url.repo_id).private:
            raise BundleError(
                f"{url} exists and is public, but a private upload was requested: nothing was uploaded\n"
                "choose another name, or allow a public upload with --public"
            )
        api.upload_folder(
            folder_path=folder,
            repo_id=url.repo_id,
            commit_message=message or f"Bundle of accent_plugin {accent_plugin.__version__}",
            ignore_patterns=[".*", "**/.*"],
        )
    except OfflineModeIsEnabled:
        raise BundleError(f"cannot upload to {api.endpoint} while HF_HUB_OFFLINE is set: unset it") from None
    except HfHubHTTPError as error:
        raise BundleError(_refused(error, api.endpoint, repo)) from error
    except (HTTPError, OSError) as error:
        raise BundleError(
            f"{api.endpoint} cannot be reached: {error or type(error).__name__}\n"
            "check the network and run the same command again: files that have arrived are not sent twice"
        ) from error
    except ValueError as error:
        raise BundleError(f"{folder} cannot be uploaded: {error}") from error
    return str(url)


def _refused(error, endpoint, repo):
    status = error.response.status_code
    answer = error.server_message or str(error).strip().splitlines()[0]
    remedies = {
        401: "the token is wrong or has expired: log in with `hf auth login` and a token with write permission",
        403: "this token has no write permission there: check the namespace, and the role of the token",
        404: "check the name, and whether this token has access to the repository",
    }
    return f"{endpoint} refused {repo} with {status}: {answer}\n{remedies.get(status, 'try again later')}"
