"""Every error that wanfit raises on purpose.

    WanfitError
    ├── BadRequest            the caller must change what was asked
    │   ├── BadFrameCount     the number of frames is not 4n + 1, or out of range
    │   ├── BadSize           width or height is not on the model's grid, or out of range
    │   ├── BadOption         another option has an illegal value, or two exclude each other
    │   ├── BadImage          the image is missing, not wanted, unreadable or too large
    │   ├── BadOutput         the output cannot be written there, or its suffix is unknown
    │   ├── UnknownModel      no model of that name
    │   ├── BadSetting        a setting of the server is missing, half given or illegal
    │   ├── BadUrl            an address that this server does not ask, or that is malformed
    │   └── UrlFailed         what an address gave is too large, too slow, or an error
    ├── WeightsError          the model's files must change
    │   ├── WeightsMissing    files that the model needs are not there
    │   ├── WeightsBroken     a file is truncated, or does not hold what its header says
    │   └── WeightsMismatch   whole files, but of another model
    ├── NoRoom                the machine has too little of something
    │   ├── DoesNotFit        the plan needs more memory than the budget, so nothing was begun
    │   ├── OutOfMemory       memory ran out although the plan said that it fits
    │   └── DiskFull          the disk has too little free space for what would be written
    ├── DownloadFailed        the model could not be brought from the hub
    │   ├── NoAccess          the hub does not let this token, or nobody without one, read it
    │   ├── NotOnHub          the hub has no such repository, revision or file
    │   ├── HubFailed         the hub, or the way to it, did not answer as it should, several times
    │   └── BadDownload       what came is not what the hub lists: another length or checksum
    ├── StoreFailed           a finished clip could not be put in its store, or not be had from it
    │   ├── NotKept           the store has nothing by that key (any more)
    │   ├── StoreGone         the store did not answer for as long as we tried
    │   └── StoreRefused      the store answers, and does not let us: credentials, bucket, policy
    └── JobsError             the queue of jobs does not allow it, or cannot be used now
        ├── NoSuchJob         there is no job of that id, or it is another owner's
        ├── KeyReused         an idempotency key, or an id, came again with another request
        ├── QueueFull         as many jobs wait as may
        ├── StaleLease        the attempt is not the job's newest any more, so its word is refused
        └── DatabaseBusy      the database is locked or away for longer than we wait

`message` says what happened, with both numbers where there are two; `hint` says what to do about
it. `code` is stable and meant for programs. Nothing here knows about exit codes or HTTP: the edges
map the branches (and a test holds that every leaf is mapped).
"""

from __future__ import annotations

from typing import ClassVar


class WanfitError(Exception):
    """Base of all errors raised on purpose. `str(error)` is one line: message, then hint."""

    code: ClassVar[str] = "error"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(f"{message}. {hint}" if hint else message)
        self.message = message
        self.hint = hint


class BadRequest(WanfitError):
    """What was asked cannot be done by any machine; the caller must change it."""

    code = "bad_request"


class BadFrameCount(BadRequest):
    """`num_frames` is not of the form 4n + 1, or out of the model's range."""

    code = "bad_frame_count"


class BadSize(BadRequest):
    """`width` or `height` is not a multiple of the model's grid, or out of its range."""

    code = "bad_size"


class BadOption(BadRequest):
    """An option other than size, frames, image and output has an illegal value."""

    code = "bad_option"


class BadImage(BadRequest):
    """The image is missing, given to a model that takes none, unreadable, or too large."""

    code = "bad_image"


class BadOutput(BadRequest):
    """The output path cannot be written, or its suffix names no format."""

    code = "bad_output"


class UnknownModel(BadRequest):
    """No model has that name; the hint names the closest one."""

    code = "unknown_model"


class BadSetting(BadRequest):
    """A setting of the server is missing, half given or illegal; the message names it."""

    code = "bad_setting"


class BadUrl(BadRequest):
    """An address that is malformed, or leads where this server asks nothing: a private network."""

    code = "bad_url"


class UrlFailed(BadRequest):
    """An address was asked and gave no use: an error, too many bytes, too many seconds."""

    code = "url_failed"


class WeightsError(WanfitError):
    """The files of a model do not serve the request."""

    code = "weights_error"


class WeightsMissing(WeightsError):
    """A file or a tensor that the model needs is not there."""

    code = "weights_missing"


class WeightsBroken(WeightsError):
    """A weight file is truncated or unreadable, or holds tensors that no network takes."""

    code = "weights_broken"


class WeightsMismatch(WeightsError):
    """The files are whole but belong to another model than the one asked for."""

    code = "weights_mismatch"


class NoRoom(WanfitError):
    """This machine, or the budget given, has too little memory or disk for what was asked."""

    code = "no_room"


class DoesNotFit(NoRoom):
    """The plan needs more than the budget; the hint names the nearest things that would fit."""

    code = "does_not_fit"


class OutOfMemory(NoRoom):
    """Memory ran out in spite of the plan; the message says what was held."""

    code = "out_of_memory"


class DiskFull(NoRoom):
    """Too little free disk, found before or while writing; no final name shows half of anything."""

    code = "disk_full"


class DownloadFailed(WanfitError):
    """A model could not be brought from the hub; what came so far is kept for the next try."""

    code = "download_failed"


class NoAccess(DownloadFailed):
    """The hub refuses: no token, a wrong one, or terms that its owner has not accepted."""

    code = "no_access"


class NotOnHub(DownloadFailed):
    """No repository, revision or file of that name is on the hub."""

    code = "not_on_hub"


class HubFailed(DownloadFailed):
    """The hub could not be reached, was too busy or went silent, for as long as we tried."""

    code = "hub_failed"


class BadDownload(DownloadFailed):
    """A file came with another length or checksum than the hub lists, and was thrown away."""

    code = "bad_download"


class StoreFailed(WanfitError):
    """A finished clip could not be put in the store of outputs, or not be had from it."""

    code = "store_failed"


class NotKept(StoreFailed):
    """The store has nothing by that key: it was deleted, or its time was over."""

    code = "not_kept"


class StoreGone(StoreFailed):
    """The store did not answer for as long as we tried; what is on this disk stays there."""

    code = "store_gone"


class StoreRefused(StoreFailed):
    """The store answers, and refuses: credentials, bucket or policy; waiting does not help."""

    code = "store_refused"


class JobsError(WanfitError):
    """A job, or the database that keeps jobs, does not allow what was asked."""

    code = "jobs_error"


class NoSuchJob(JobsError):
    """No job has that id, it was deleted, or it belongs to somebody else."""

    code = "no_such_job"


class KeyReused(JobsError):
    """An idempotency key or a job id came a second time, with another request."""

    code = "key_reused"


class QueueFull(JobsError):
    """As many jobs wait as the server, or this owner, may have; nothing was accepted."""

    code = "queue_full"


class StaleLease(JobsError):
    """An attempt that lost its lease wanted to write; somebody else has the job, or it is over."""

    code = "stale_lease"


class DatabaseBusy(JobsError):
    """The database of jobs was locked or could not be reached for longer than we wait."""

    code = "database_busy"
