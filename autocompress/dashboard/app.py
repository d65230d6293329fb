"""The page that ``streamlit run`` executes: the list of jobs, or the job named in the address (``?job=ID``)."""

from __future__ import annotations

import argparse
import sys
import time

import streamlit as st

from autocompress.dashboard import job_page
from autocompress.dashboard.job_page import STATES, describe, refreshing, show_progress
from autocompress.errors import AutoCompressError
from autocompress.service.store import Job, JobStore

MAX_LISTED = 50


@st.cache_resource
def open_store(path: str | None) -> JobStore:
    """One store for all visitors of this process."""
    return JobStore(path)


def store_argument() -> str | None:
    """The ``--store`` behind Streamlit's own options; without it the store's default place."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--store")
    chosen: str | None = parser.parse_known_args(sys.argv[1:])[0].store
    return chosen


def age(seconds: float) -> str:
    """``"3 min ago"``."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return "just now"


@refreshing
def list_jobs(store: JobStore) -> None:
    """All jobs, the newest first; draws itself again every two seconds."""
    jobs = store.list(limit=MAX_LISTED + 1)
    if not jobs:
        st.info(
            "This store has no jobs yet; submit one with"
            " `autocompress submit digits --budget 'latency_ms<=50%@local'` and run it with `autocompress worker`."
        )
    for job in jobs[:MAX_LISTED]:
        _row(job)
    if len(jobs) > MAX_LISTED:
        st.caption(f"The newest {MAX_LISTED} jobs; `autocompress jobs list` shows all.")


def _row(job: Job) -> None:
    with st.container(border=True):
        state, what, how, when, door = st.columns([1.3, 4, 3.4, 1.2, 0.9], vertical_alignment="center")
        colour, icon = STATES[job.state]
        state.badge(job.state, color=colour, icon=icon)  # type: ignore[arg-type]
        title, details = describe(job)
        what.markdown(f"**{title}** `{job.id}`  \n:small[{details}]")
        with how:
            show_progress(job)
        when.caption(age(time.time() - job.created))
        target = job.request["job"] if job.kind == "export" else job.id
        if door.button("Open", key=f"open-{job.id}", width="stretch"):
            st.query_params["job"] = target
            st.rerun(scope="app")


def main() -> None:
    """Draw the page; what the store refuses is shown as its sentence."""
    st.set_page_config(page_title="AutoCompress", page_icon=":material/compress:", layout="wide")
    st.html("<style>.block-container {padding-top: 2.6rem; padding-bottom: 2rem; max-width: 1360px}</style>")
    try:
        store = open_store(store_argument())
        if wanted := st.query_params.get("job"):
            job_page.show(store, store.get(wanted))
        else:
            st.markdown(f"### AutoCompress jobs\n:small[:gray[{store.path}]]")
            list_jobs(store)
    except AutoCompressError as error:
        st.error(str(error))
        if "job" in st.query_params and st.button("All jobs", icon=":material/arrow_back:"):
            st.query_params.clear()
            st.rerun()


main()
