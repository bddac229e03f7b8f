#!/bin/sh
# Starts Redis. Scores must survive: appended to a file as they come, never evicted. The configuration comes by standard input,
# so that the password is in no file and in no list of processes. Arguments: further lines of it.
password=$(cat /run/secrets/redis_password)
exec redis-server - <<END
requirepass $password
masterauth $password
dir /data
appendonly yes
appendfsync everysec
save ""
maxmemory ${REDIS_MAXMEMORY:-0}
maxmemory-policy noeviction
$(printf '%s\n' "$@")
END
