"""Files and rows, made to agree: at the start, when a dead server may have left either alone.

A file without a row is what an attempt kept before it could say so. When its lease is still the
job's, the clip is whole and the job is completed with it, instead of being made again; otherwise
nobody will ever ask for it, and it is deleted. A row without a file notes that its output is gone.
Attempts of other servers that live are left alone: their leases tell.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass

from wanfit.errors import StaleLease, StoreFailed
from wanfit.jobs.job import Claim
from wanfit.jobs.store import JobStore
from wanfit.outputs import Kept, OutputStore, key_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What was found."""

    adopted: tuple[str, ...]  # jobs that were completed with the clip that their attempt had kept
    requeued: tuple[str, ...]  # jobs whose worker was gone: queued again, or ended
    orphans: tuple[str, ...]  # keys of files that were deleted
    gone: tuple[str, ...]  # jobs whose files are missing


def reconcile(store: JobStore, outputs: OutputStore, *, drafts: bool) -> Reconciled:
    """drafts: no worker of this process runs yet, so what lies in drafts is dead.

    Raises StoreFailed when the files cannot be listed: nothing was decided then.
    """
    results = store.results()
    dead = store.dead_claims()
    stored = {file.key for file in outputs.keys()}  # noqa: SIM118  it is no dict
    adopted = [
        claim.job.id
        for claim in dead
        if key_of(claim.job.id, claim.lease) in stored and _adopt(store, outputs, claim)
    ]
    ended = store.reap_dead()
    lost = [key for key, gone in results.items() if not gone and key not in stored]
    found_again = [key for key, gone in results.items() if gone and key in stored]
    gone = store.note_outputs(lost, gone=True)
    store.note_outputs(found_again, gone=False)  # the disk was not mounted the last time
    running = store.running()
    # Asked after the files were listed: what was completed meanwhile is no orphan.
    wanted = {*store.results(), *(key_of(claim.job.id, claim.lease) for claim in running)}
    orphans = sorted(stored - wanted)
    for key in orphans:
        outputs.delete(key)
    if drafts:
        outputs.clear_drafts({claim.job.id for claim in running})
    found = Reconciled(
        tuple(adopted),
        tuple(job.id for job in ended),
        tuple(orphans),
        tuple(job.id for job in gone),
    )
    log.info(
        "reconciled: %d adopted, %d queued again, %d orphans deleted, %d outputs gone",
        *(len(ids) for ids in (found.adopted, found.requeued, found.orphans, found.gone)),
    )
    return found


def _adopt(store: JobStore, outputs: OutputStore, claim: Claim) -> bool:
    """Completes a job with the clip that its dead attempt had kept."""
    try:
        body = outputs.open(key_of(claim.job.id, claim.lease), variant="metadata")
        fields = json.loads(b"".join(body.pieces))
        kept = Kept.from_json({name: fields[name] for name in Kept.__slots__})
        return store.complete(claim, kept, fields["metadata"]["report"]).state == "completed"
    except (StoreFailed, StaleLease, KeyError, ValueError) as error:
        log.warning("job %s: what its attempt kept is of no use: %r", claim.job.id, error)
        return False
