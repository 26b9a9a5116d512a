#!/usr/bin/env bash
# Every bench preset beside public implementations, in turns -> docs/results/cpu.md, cpu.json
#
# usage: scripts/bench_cpu.sh [CASE…]     (default: all; the others keep their rows)
#   A case is a preset. With :DTYPE ours runs in that number format, such as infer-50m:bf16, which
#   decodes with weights stored so; the peer of that row is our own f32.
#   PEERS         a Python with what scripts/cpu_peers.py needs; without it, ours alone
#   PEER_SCRIPT   another script with its command line (default: scripts/cpu_peers.py)
#   ROUNDS        runs of each side, in turns (default 5); each is the median of several steps
#   THREADS       threads of both sides (default 2)
#   NOTE          a sentence on the peers for the table; it stays until there is another
#   XLSTM         the program, where it is built already
#   RESULT        the name of the table's files (default cpu): one for each machine
#   MACHINE       what the table says it was measured on (default: the processor's name)
# The figure of a side is the median of its runs. Of several peers the fastest counts; one that is
# slower than 0.8 of the fastest after two rounds runs no more. Needs an idle machine: only ratios of
# one session mean something, and the load before each case is written down.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ -n ${XLSTM:-} ]] || cargo build --release -p xlstm-cli
exec python3 - "$@" <<'PYTHON'
import datetime, json, os, pathlib, statistics, subprocess, sys

CASES = """large-128 large-256 large-256:bf16 lm-mlstm-128 lm-mlstm-256 lm-slstm-128 lm-slstm-256 lm-mixed-128 pyx-slstm-128
pyx-slstm-256 pyx-mlstm-128 pyx-mlstm-256 lstm-128 lstm-eq256 gpt-128 gpt-256 infer-50m infer-50m:bf16
infer-50m:int8 infer-50m:int4""".split()
rounds, threads = int(os.environ.get("ROUNDS", "5")), os.environ.get("THREADS", "2")
peers, script = os.environ.get("PEERS"), os.environ.get("PEER_SCRIPT", "scripts/cpu_peers.py")
results, name = pathlib.Path("docs/results"), os.environ.get("RESULT", "cpu")
program = os.environ.get("XLSTM", "target/release/xlstm")


def say(line):
    print(line, file=sys.stderr, flush=True)


def measure(command):
    """The JSON that a command prints last; None, and its last words, where it fails."""
    try:
        done = subprocess.run(command, env={**os.environ, "THREADS": threads}, capture_output=True, text=True, timeout=1800)
        if done.returncode == 0:
            return json.loads(done.stdout.strip().splitlines()[-1])
        why = done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]
    except (subprocess.TimeoutExpired, json.JSONDecodeError, IndexError, OSError) as error:
        why = [str(error)]
    say(f"  failed: {' '.join(command[1:])}: {why[0][:200]}")
    return None


def ours(kind, preset, dtype):
    command = [program, "bench", kind, "--preset", preset, "--threads", threads, "--device", "cpu", "--json"]
    return measure(command + ([] if dtype == "f32" else ["--dtype", dtype]))


def peer(preset, name):
    return measure([peers, script, preset, name])


def middle(runs, key):
    found = [run[key] for run in runs if run.get(key) is not None]
    return statistics.median(found) if found else None


def whole(number):
    return None if number is None else int(number)


def ratio(a, b):
    return a / b if a and b else None


def row(case, mine, others, key, loads):
    """One line: the median of our runs beside that of the fastest peer."""
    medians = {name: middle(runs, key) for name, runs in others.items() if runs}
    best = max(medians, key=medians.get, default=None)
    theirs = others[best] if best else []
    memory = middle(mine, "peak_memory_mb"), middle(theirs, "peak_memory_mb")
    return {
        "case": case, "ours": middle(mine, "tokens_per_s"), "peer": medians.get(best), "peer_name": best,
        "ratio": ratio(middle(mine, "tokens_per_s"), medians.get(best)), "floor_share": middle(mine, "floor_share"),
        "ours_memory_mb": memory[0], "peer_memory_mb": memory[1], "memory_ratio": ratio(*memory),
        "framework_memory_mb": middle(theirs, "framework_memory_mb"),
        "params": whole(middle(mine, "params")), "peer_params": whole(middle(theirs, "params")), "gflops": middle(mine, "gflops"),
        "product_gflops": middle(mine, "product_gflops"), "bandwidth_gb_s": middle(mine, "bandwidth_gb_s"),
        "runs": [len(mine), len(theirs)], "peers": medians, "failed": sorted(n for n, runs in others.items() if not runs),
        "load": loads, "date": datetime.date.today().isoformat(),
    }


def run(case):
    """The rows of a case."""
    preset, _, dtype = case.partition(":")
    loads, dtype, inference = round(os.getloadavg()[0], 2), dtype or "f32", preset.startswith("infer")
    say(f"{case}: load {loads}")
    if inference and dtype != "f32":
        mine, wide = [], []
        for _ in range(rounds):
            for runs, format in ((mine, dtype), (wide, "f32")):
                runs.extend(filter(None, [ours("decode", preset, format)]))
        return [row(f"{preset} decode {dtype}", mine, {"ours, f32": wide}, "tokens_per_s", loads)] if mine else []
    names = []
    if peers:
        names = subprocess.run([peers, script, "--candidates", preset], capture_output=True, text=True, check=True).stdout.split()
    kinds = {"prefill": "prefill_tokens_per_s", "decode": "decode_tokens_per_s"} if inference else {"train": "tokens_per_s"}
    mine, others, racing = {kind: [] for kind in kinds}, {name: [] for name in names}, list(names)
    for turn in range(rounds):
        for kind in kinds:
            mine[kind].extend(filter(None, [ours(kind, preset, dtype)]))
        for name in list(racing):
            result = peer(preset, name)
            if result:
                others[name].append(result)
            else:
                racing.remove(name)
        if turn == 1:
            # A peer goes on as long as it may be the fastest at something.
            best = {key: max((middle(others[name], key) for name in racing), default=0) for key in kinds.values()}
            racing = [n for n in racing if any(middle(others[n], key) >= 0.8 * best[key] for key in kinds.values())]
    title = {"train": preset if dtype == "f32" else f"{preset} {dtype}"}
    return [row(title.get(kind, f"{preset} {kind}"), mine[kind], others, key, loads) for kind, key in kinds.items() if mine[kind]]


def number(value, digits=0):
    return "" if value is None else f"{value:,.{digits}f}"


def write(rows, machine, note):
    document = {"machine": machine, "threads": int(threads), "note": note, "rows": rows}
    (results / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    lines = [
        "# On the CPU, beside public implementations", "",
        f"Made by `scripts/bench_cpu.sh`: {machine}, {threads} threads, f32 unless a row says otherwise (a row of training in",
        "bf16 has the peers in f32). Rows without a",
        "second word are whole training steps: forward, backward and AdamW, ours also with clipping by the global norm.",
        "`infer-50m` reads 512 tokens (ours with the last logits only, peers with all), or draws 128 one at a time.", "",
        "Each figure is the median of the runs of its side, taken in turns with the other; each run is the median of",
        "several steps in a process of its own. Of several peers the fastest counts. Only ratios mean something. Share",
        "of floor: the time that the machine needs for the products of the step, or for reading the weights in decode,",
        "at the rates that were measured in the same run (`xlstm help bench`), over the time needed. Memory is the most",
        "that a process held, in 10^6 bytes; a peer's has the framework in it, the number in brackets.", "",
        "| case | ours, tokens/s | peer, tokens/s | ratio | peer | share of floor | ours, MB | peer, MB | ratio | runs | load | date |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        share = "" if r["floor_share"] is None else f"{100 * r['floor_share']:.0f} %"
        framework = f" ({number(r['framework_memory_mb'])})" if r["framework_memory_mb"] else ""
        failed = f"; failed: {', '.join(r['failed'])}" if r["failed"] else ""
        lines.append(
            f"| {r['case']} | {number(r['ours'])} | {number(r['peer'])} | {number(r['ratio'], 2)} | {r['peer_name'] or ''}{failed} "
            f"| {share} | {number(r['ours_memory_mb'])} | {number(r['peer_memory_mb'])}{framework} | {number(r['memory_ratio'], 2)} "
            f"| {r['runs'][0]}, {r['runs'][1]} | {r['load']} | {r['date']} |")
    rates = [(r["product_gflops"], r["bandwidth_gb_s"]) for r in rows if r["product_gflops"]]
    if rates:
        lines += ["", f"Rates of the machine, medians over the rows: {statistics.median(p for p, _ in rates):.0f} GFLOP/s in f32 products, "
                  f"{statistics.median(b for _, b in rates):.1f} GB/s read."]
    lines += ["", note] if note else []
    lines += ["", "Parameters, ours and the peer's:", "", "| case | ours | peer |", "|---|---|---|"]
    lines += [f"| {r['case']} | {number(r['params'])} | {number(r['peer_params'])} |" for r in rows]
    (results / f"{name}.md").write_text("\n".join(lines) + "\n")


cases = sys.argv[1:] or CASES
try:
    before = json.loads((results / f"{name}.json").read_text())
except FileNotFoundError:
    before = {"rows": []}
rows, note = before["rows"], os.environ.get("NOTE", before.get("note", ""))
processor = [line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
machine = os.environ.get("MACHINE", processor[0] if processor else "an unnamed processor")
# Rows in the order of the cases; those of other number formats behind their own.
place = lambda title: (next((i for i, case in enumerate(CASES) if case == title.split()[0]), len(CASES)), title)
failed = []
for case in cases:
    try:
        fresh = run(case)
    except Exception as error:
        say(f"  failed: {case}: {error}")
        fresh = []
    failed += [] if fresh else [case]
    names = {r["case"] for r in fresh}
    rows = [r for r in rows if r["case"] not in names] + fresh
    rows.sort(key=lambda r: place(r["case"]))
    if fresh:
        write(rows, machine, note)
    for r in fresh:
        say(f"  {r['case']}: {number(r['ours'])} and {number(r['peer'])} tokens/s ({r['peer_name']}), ratio {number(r['ratio'], 2)}, "
            f"floor {number(100 * (r['floor_share'] or 0))} %")
say(f"wrote {results}/{name}.md and {name}.json" + (f"; failed: {', '.join(failed)}" if failed else ""))
sys.exit(1 if failed else 0)
PYTHON
