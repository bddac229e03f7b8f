#!/bin/sh
# Whether Redis answers (with an error while it still loads its file) and, where it makes a cluster, whether that is there.
REDISCLI_AUTH=$(cat /run/secrets/redis_password)
export REDISCLI_AUTH
redis-cli -e ping && { [ ! -e /tmp/makes-cluster ] || redis-cli cluster info | grep cluster_state:ok; }
