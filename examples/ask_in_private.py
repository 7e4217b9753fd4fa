"""A question that the model's owner cannot read: a server process owns the weights, this one owns the prompt.

entropi train runs/first --steps 60        # any run folder will do
python examples/ask_in_private.py runs/first "import os"
"""

import re
import subprocess
import sys

from entropi.private import Sampling, connect

folder, prompt = sys.argv[1:3]

# The owner's side. On two machines it runs elsewhere, with certificates: see docs/deploy.md.
command = [sys.executable, "-m", "entropi", "serve", folder, "--listen", "127.0.0.1:0"]
server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
try:
    for line in server.stdout:
        print(f"server: {line.rstrip()}")
        if found := re.search(r"listening on ([\d.]+:\d+)", line):
            break
    else:
        sys.exit("the server did not start")

    # The client's side: it learns the architecture and the tokenizer, and never sees a weight.
    connection = connect(found[1])
    print(f"architecture {connection.description.architecture}; {connection.trust}")

    answer = connection.ask(prompt, max_new_tokens=2, sampling=Sampling(temperature=0))
    record = answer.record
    print(f"{prompt!r} -> {record.new_text!r}")
    print(f"{record.bytes / 1e6:.1f} MB in both directions, {record.messages:,} messages, {record.seconds:.1f} s")

    slowest = max(record.stages, key=lambda stage: stage.bytes)
    print(f"most bytes: {slowest.name} in layer {slowest.layer}, {slowest.bytes / 1e6:.1f} MB")
finally:
    server.terminate()
    server.wait(20)
