"""The fault run: a real broker, real stores and real workers, and a checker that knows the truth.

    python -m tests.fault [--short] [--seed N] [--only NAME ...]        (`make fault-test`)

Data in: a seeded, endless stream of item events (edits whose times are not in order and often
equal, exact duplicates, takedowns, single JSON records and Arrow batches), of interactions and of
erasures of users, sent at a steady rate while things die (``traffic``). Every record that the
broker acknowledged is remembered.

Truth: a slow plain-Python reference over those records (``truth``) that shares no code with the
stores: per item the greatest (event_timestamp, content hash), with the codes that the published
codebook gives its vector; per user the latest positives after the last erasure, online and as
Feast materializes them; and every distinct event once in the offline log.

What fails (``scenarios``): workers (SIGKILL, SIGSTOP past the session timeout), the broker
(SIGKILL), the group's membership (joins and leaves), the online store (killed, hung), the disk
below the offline store (full), the records themselves (``mutations``).

How it is measured: an expected row that is absent is lost; one that an older event wrote is stale;
any other difference is wrong. Offline rows are read as Feast reads them, each event once; what is
there twice all the same is duplicated; what the raw log holds beyond that was sent twice or
replayed (repeated). Time to recover: from the end of a fault (a kill, the store
answering again) until the group has committed everything that was sent before that moment; offsets
are committed only when both stores hold the rows.

The workers are processes forked from one that has imported the package and done nothing else, so
that the run spends its time on faults and not on imports; each runs ``qarm-stream run``. Session
timeout 3 s (2 s where workers are killed), so that a run of minutes sees many take-overs.
"""
