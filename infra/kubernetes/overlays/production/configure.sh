#!/bin/sh
# Writes the settings of one Redis node and of the Sentinel beside it. Which node is the primary, in this order: what
# the other Sentinels say; what this one remembers on its volume; the first node. A node that comes back while the
# others have a new primary becomes its replica.
set -eu

nodes=redis-nodes.fnqueue.svc.cluster.local
self="$HOSTNAME.$nodes"
kept=/data/sentinel.conf

primary=$(timeout 5 redis-cli -h redis-sentinel -p 26379 --raw sentinel get-master-addr-by-name fnqueue 2>/dev/null |
  sed -n '1p' | grep -F ".$nodes" || true)
if [ -z "$primary" ] && [ -s "$kept" ]; then
  primary=$(sed -n 's/^sentinel monitor fnqueue \([^ ]*\) .*/\1/p' "$kept" | sed -n '1p')
fi
primary=${primary:-redis-0.$nodes}

umask 077
# As infra/redis/redis.conf, which says why. A primary that no replica follows takes no writes: it may be cut off.
cat >/conf/redis.conf <<CONF
dir /data
appendonly yes
appendfsync always
save ""
rdbcompression no
maxmemory-policy noeviction
requirepass $REDIS_PASSWORD
masterauth $REDIS_PASSWORD
replica-announce-ip $self
min-replicas-to-write 1
min-replicas-max-lag 10
CONF
if [ "$primary" != "$self" ]; then
  echo "replicaof $primary 6379" >>/conf/redis.conf
fi

# Sentinel writes into its own file; what it knows of the others it keeps.
if [ ! -s "$kept" ]; then
  cat >"$kept" <<CONF
port 26379
protected-mode no
sentinel resolve-hostnames yes
sentinel announce-hostnames yes
sentinel announce-ip $self
sentinel monitor fnqueue $primary 6379 2
sentinel down-after-milliseconds fnqueue 5000
sentinel failover-timeout fnqueue 30000
sentinel parallel-syncs fnqueue 1
CONF
  echo "sentinel auth-pass fnqueue $REDIS_PASSWORD" >>"$kept"
fi
