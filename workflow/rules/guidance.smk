"""Messages about wrong targets and a locked folder, and the handling of Ctrl-C. This file has no rules."""

import atexit
import difflib
import signal
import threading
from contextlib import suppress
from datetime import datetime

import psutil
from snakemake.cli import get_argument_parser
from snakemake.shell import shell

# tee ignores Ctrl-C, so that the output of a job that saves and stops is logged. The other options are Snakemake's.
if Path(shell.get_executable() or "").name == "bash":
    shell.prefix('set -euo pipefail; tee() {{ exec tee -i "$@"; }}; ')

TARGET_OF = {
    "evaluate_archs": "evaluate",
    "diagnose": "compare_experiment",
    "measure_experiment": "compare_experiment",
}
RULE_NAMES = {}
STOPPED = "Stopped. Trainings have saved their state, measurements are kept; the same command continues."


def options():
    """Snakemake's own command line, parsed; None in a job of the run, or if another program uses Snakemake."""
    program = Path(sys.argv[0])
    ours = program.name == "snakemake" or program.parts[-2:] == ("snakemake", "__main__.py")
    return get_argument_parser().parse_known_args()[0] if ours and workflow.is_main_process else None


def check_targets():
    """Exit with one line that names the right target, if a target is a rule with wildcards or does not exist."""
    parsed = options()
    if parsed is None:
        return
    RULE_NAMES.update((each.name, each) for each in workflow.rules)
    for name in parsed.targets:
        if name in RULE_NAMES and RULE_NAMES[name].has_wildcards():
            sys.exit(f"error: the rule {name} has a wildcard and is no target; type {target_of(name)}, or name a file")
    for name in [*parsed.targets, *parsed.forcerun, *parsed.until, *parsed.omit_from]:
        path = name if os.path.isabs(name) else os.path.relpath(name)
        if name not in RULE_NAMES and not any(each.is_producer(path) for each in workflow.rules):
            sys.exit(f"error: {suggestion(name, path, of_rules=name not in parsed.targets)}")


def target_of(name):
    """The target that runs all jobs of a rule."""
    return TARGET_OF.get(name, f"{name}s") if RULE_NAMES[name].has_wildcards() else name


def suggestion(name, path, *, of_rules):
    """Error for a name that is no rule and no file of a rule, with the closest one."""
    if len(Path(path).parts) == 1:
        near = difflib.get_close_matches(name, RULE_NAMES, n=1)
        meant = "".join(f"; did you mean {each if of_rules else target_of(each)}?" for each in near)
        return f"{name} is no {'rule' if of_rules else 'target'}{meant or '; snakemake --list names all rules'}"
    folder, file = f"results/{run.run}", Path(path).name
    if not path.startswith(f"{folder}/"):
        return f"no rule writes {name}; this config writes to {folder}, as its key run is {run.run}"
    written = {Path(output).name for each in workflow.rules for output in each.output}
    near = difflib.get_close_matches(file, written - {file}, n=1)
    meant = "".join(f"; did you mean {Path(path).with_name(each)}?" for each in near)
    return f"no rule writes {name}{meant or '; snakemake --summary lists the files of this config'}"


def print_lock_holder():
    """If the folder is locked, print which Snakemake works in it, or that none on this machine does."""
    parsed = options()
    if parsed is None or parsed.unlock or parsed.dryrun or not any(Path(".snakemake/locks").glob("*")):
        return
    for process in psutil.process_iter(["pid", "cmdline", "cwd", "create_time"]):
        found = process.info
        program = [Path(word).name for word in (found["cmdline"] or [])[:3]]
        if found["pid"] != os.getpid() and found["cwd"] == os.getcwd() and "snakemake" in program:
            since = datetime.fromtimestamp(found["create_time"]).strftime("%Y-%m-%d %H:%M")
            note = f"note: Snakemake works in this folder already, process {found['pid']} since {since}: let it end, "
            print(f"{note}or stop it with kill -INT {found['pid']}; --unlock would let both write", file=sys.stderr)
            return
    note = (
        "note: this folder is locked, but no Snakemake on this machine works in it. If none on another machine does, "
    )
    print(f"{note}type the same command with --unlock, then with --rerun-incomplete", file=sys.stderr)


def handle_ctrl_c():
    """Let Ctrl-C end a run without losing a finished job.

    By default Snakemake waits for the running jobs but does not record those that finish, and a second Ctrl-C leaves
    the folder locked. Here the first Ctrl-C starts no more jobs, as SIGTERM does; a second one is sent to the jobs too,
    as a terminal does by itself. On a cluster Snakemake cancels the jobs, which must not be interrupted.
    """
    seen = []

    def stop(number, frame):
        seen.append(number)
        if len(seen) == 1:
            atexit.register(print, STOPPED, file=sys.stderr)
        if not workflow.local_exec:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            raise KeyboardInterrupt
        if len(seen) > 1:
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    child.send_signal(signal.SIGINT)
            return
        words = "\nStopping: jobs that got the signal save and stop, others end first; Ctrl-C again stops them too."
        print(words, file=sys.stderr, flush=True)
        threading.Thread(target=workflow.scheduler.exit_gracefully).start()  # it needs a lock that this thread may hold

    signal.signal(signal.SIGINT, stop)


# A Snakefile that uses this workflow as a module calls check_targets below its own rules.
if workflow.modifier.is_main_snakefile():
    check_targets()
print_lock_holder()
