"""What several test files share: reference algorithms, small adapters and their training, chats."""

import copy
import json
import math
import re
import shutil
import subprocess

import pytest
import tiny
import torch
from torch.profiler import ProfilerActivity, profile

from corda_lora import CordaConfig
from corda_lora.adapters.lora import install, lora_layers, save_adapter
from corda_lora.preprocess.pipeline import preprocess


def pefts_damping(C):
    """The λ that PEFT ends with: doubled until its float32 inverse is good."""
    damping, eye = 0.01, torch.eye(len(C))
    while True:
        regular = C + torch.diag(torch.ones(len(C)) * C.diagonal().mean() * damping)
        if torch.dist(regular @ torch.linalg.inv(regular), eye) < 0.05:
            return damping
        damping *= 2


def literal_selection(W, covariances, damping=0.01):
    """Algorithm 1 for one layer: the index of the covariance, and every score."""
    scores = []
    for C in covariances:
        C = C + damping * C.diagonal().mean() * torch.eye(len(C), dtype=torch.float64)
        eigenvalues = torch.linalg.eigvalsh(C)
        pi = math.sqrt(W.shape[0]) * eigenvalues[-1] / eigenvalues[0]
        sigma = torch.linalg.svdvals(W.double() @ C)
        scores.append(float(torch.log(pi) * sigma.sum() / sigma[0]))
    return scores.index(min(scores)), scores


def literal_allocation(spectra, log_pis, costs, budget, mode, min_rank=1, max_rank=None):
    """Algorithm 2: filter one component at a time, always the cheapest of the model; the rank of every layer."""
    sizes = [len(sigma) for sigma in spectra]
    least = [min(min_rank, R) for R in sizes]
    most = [max(low, min(max_rank or R, R)) for low, R in zip(least, sizes)]
    filtered = list(least) if mode == "kpm" else [R - high for R, high in zip(sizes, most)]
    end = most if mode == "kpm" else [R - low for R, low in zip(sizes, least)]

    def parameters():
        return sum((f if mode == "kpm" else R - f) * cost for f, R, cost in zip(filtered, sizes, costs))

    while mode == "kpm" or parameters() > budget:
        best, cheapest = None, math.inf
        for layer, sigma in enumerate(spectra):
            r = filtered[layer] + 1
            if r <= end[layer]:
                remaining = float(sigma[: sizes[layer] - r].sum())
                score = log_pis[layer] * float(sigma[-r]) / remaining if remaining else math.inf
                if best is None or score < cheapest:
                    best, cheapest = layer, score
        if best is None:
            break
        filtered[best] += 1
        if mode == "kpm" and parameters() > budget:
            filtered[best] -= 1
            break
    return filtered if mode == "kpm" else [R - f for f, R in zip(filtered, sizes)]


CHATML = (
    "{% for m in messages %}{{ '#' + m['role'] + '\\n' + m['content'] + '$\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '#assistant\\n' }}{% endif %}"
)


CHAT = [("system", "be brief"), ("user", "one?"), ("assistant", "1"), ("user", "two?"), ("assistant", "2")]


def messages(chat=CHAT, role="role", content="content", **names):
    return [{role: names.get(r, r), content: text} for r, text in chat]


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


SPLITS = ["paper", "balanced", "anchored", "seeded"]


def start(family="llama", split="balanced", **options):
    """A model and the start for it, at s = 2."""
    model = tiny.build(family)
    config = CordaConfig(split=split, **{"r": 4, "lora_alpha": 8, **options})
    return model, preprocess(model, config, tiny.batches(family), progress=False)


def train(adapted, steps=4, family="llama", weight_decay=0.0):
    """Plain torch, no Trainer; dropout is off."""
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=weight_decay)
    for step in range(steps):
        batch = tiny.batches(family)[step % 3]
        adapted(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted


def tuned(family="llama", split="balanced", **options):
    """The original model, a trained adapter on a copy of it, and its logits."""
    model, found = start(family, split, **options)
    adapted = train(install(copy.deepcopy(model), copy.deepcopy(found)), family=family)
    moved = tiny.logits(adapted, family)
    assert (moved - tiny.logits(model, family)).abs().max() > 0.02  # the training did something
    return model, found, adapted, moved


def saved(adapted, found, folder):
    save_adapter(adapted, folder, {"corda.json": {"model": "tiny", **found.record}})
    return folder


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@torch.no_grad()
def deltas(adapted):
    """s·B A of every layer, float64, as W lies in memory for `nn.Linear`."""
    return {
        name: layer.scaling["default"]
        * layer.lora_B["default"].weight.double()
        @ layer.lora_A["default"].weight.double()
        for name, layer in lora_layers(adapted).items()
    }


FRAMES = """<body><pre></pre>
<iframe src="page.html" width="1280" height="900"></iframe><iframe src="page.html" width="390" height="800"></iframe>
<script>
addEventListener("message", (event) => { document.querySelector("pre").append(event.data + "\\n"); });
</script></body>"""


def browse(page, probe, folder, theme):
    """Chromium's view of a page in a folder, for a reader who likes the `theme`: what the script `probe` posts, at 1280
    and 390 pixels; the console. Skips the test where there is no Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    (folder / "page.html").write_text(page.replace("</body>", probe), encoding="utf-8")
    (folder / "frames.html").write_text(FRAMES)
    command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=4000", "--window-size=1400,1800"]
    command += [f"--blink-settings=preferredColorScheme={0 if theme == 'dark' else 1}"]
    command += ["--dump-dom", (folder / "frames.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    printed = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    unescape = {"&lt;": "<", "&gt;": ">", "&amp;": "&"}
    text = re.sub("|".join(unescape), lambda m: unescape[m[0]], printed[1] if printed else "")
    pages = sorted((json.loads(line) for line in text.splitlines()), key=lambda page: -page["width"])
    return {"pages": pages, "console": console, "theme": theme}


def allocated(run):
    """Most bytes that PyTorch handed out at a time, beyond those at the beginning; and the result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most, result
