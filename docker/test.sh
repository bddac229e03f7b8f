#!/usr/bin/env bash
# Builds and runs this folder's deployment, beside any other that runs: it must get healthy, keep its scores when the
# containers are replaced, and stop when asked.
set -euo pipefail
cd "$(dirname "$0")/.."

project=evosample-test-$$
if docker compose version &>/dev/null; then
  engine=docker compose=(docker compose)
elif command -v podman-compose >/dev/null; then
  engine=podman compose=(podman-compose)
else
  echo 'docker/test.sh needs docker compose or podman-compose' >&2
  exit 1
fi
compose+=(-p "$project" -f docker/compose.yaml)
EVOSAMPLE_PORT=$(.venv/bin/python -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
export EVOSAMPLE_PORT
export BUILDAH_FORMAT=docker # Podman's own image format drops HEALTHCHECK

before=$(mktemp)
cleanup() {
  (($? == 0)) || "${compose[@]}" logs || true
  rm -f "$before"
  "${compose[@]}" down -v --rmi local
}
trap cleanup EXIT

container() {
  "$engine" ps -aq --filter "label=com.docker.compose.project=$project" --filter "label=com.docker.compose.service=$1"
}

healthy() {
  case $engine in
    docker) [[ $(docker inspect -f '{{.State.Health.Status}}' "$(container "$1")") == healthy ]] ;;
    podman) podman healthcheck run "$(container "$1")" ;; # by hand: its timers need systemd
  esac
}

scores() { # scores train|compare
  .venv/bin/python - "$1" "$before" <<'PYTHON'
import os
import sys

import numpy as np

import evosample

verb, path = sys.argv[1:]
with evosample.connect(f"127.0.0.1:{os.environ['EVOSAMPLE_PORT']}", connect_timeout_s=60) as client:
    if verb == "train":
        experiment = client.create_experiment(
            "mnist", num_samples=60_000, num_epochs=4, meta_batch_size=256, mini_batch_size=64,
            policy=evosample.EvolvedSampling(prune_ratio=0.2), seed=0,
        )
        for epoch in experiment.epochs():
            for batch in epoch:
                batch.select(np.random.default_rng().random(len(batch.sample_ids)))
    exported = client.get_experiment("mnist").export_scores()
    bits = b"".join(np.asarray(column).tobytes() for column in exported)
with open(path, "rb" if verb == "compare" else "wb") as file:
    if verb == "train":
        assert exported.epoch == 4 and exported.num_visits.min() > 0
        file.write(bits)
    else:
        assert file.read() == bits, "the scores are not those from before"
PYTHON
}

"${compose[@]}" up -d --build
scores train
for service in redis server; do
  for _ in {1..60}; do ! healthy "$service" || break; sleep 1; done
  healthy "$service" || { echo "$service does not get healthy" >&2; exit 1; }
done

"${compose[@]}" down
"${compose[@]}" up -d
scores compare

# Had it not stopped by itself, it would have been killed after 10 s, with code 137.
server=$(container server)
"$engine" stop "$server"
code=$("$engine" inspect -f '{{.State.ExitCode}}' "$server")
[[ $code == 0 ]] || { echo "the server stopped with code $code" >&2; exit 1; }
echo 'docker: passed'
