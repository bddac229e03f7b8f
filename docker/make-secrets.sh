#!/usr/bin/env bash
# Makes the secrets that the compose files name, each in a file of its own, unless it is there. Keep them out of backups
# that others can read.
set -euo pipefail
cd "$(dirname "$0")/secrets"
for name in redis_password grafana_password root_token; do
  [[ -s $name ]] || (umask 077 && head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=\n' >"$name")
  chmod 444 "$name" # containers read them as other users; who may come here is up to the folder
done
chmod 700 .
