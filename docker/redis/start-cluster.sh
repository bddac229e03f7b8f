#!/bin/sh
# Starts the last node of a cluster, and puts it together with the nodes that are named, once all answer. Nodes know each other
# by address, and may come back with others: then they are introduced to each other again.
REDISCLI_AUTH=$(cat /run/secrets/redis_password)
export REDISCLI_AUTH
join() {
  until redis-cli cluster info | grep -q cluster_state:ok; do
    sleep 1
    nodes=$(for name in "$@"; do getent hosts "$name" | cut -d' ' -f1; done)
    if redis-cli cluster info | grep -q cluster_slots_assigned:0; then
      # shellcheck disable=SC2046 # one argument a node
      redis-cli --cluster create $(printf '%s:6379 ' $nodes) --cluster-yes || true
    else
      for node in $nodes; do
        redis-cli cluster meet "$node" 6379 || true
      done
      sleep 2
    fi
  done
}
touch /tmp/makes-cluster # for health.sh
join "$@" &
exec sh /etc/evosample/redis/start.sh 'cluster-enabled yes'
