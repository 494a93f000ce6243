"""What each kind of process may ask of Redis, as the rules of its ACL user. They need Redis 7, for their selectors.

`infra/redis/users.acl` is made of them. Redis checks every command of a script too, by the user who calls it, so a
script gives nobody more than he has.
"""

from __future__ import annotations

from collections.abc import Mapping

_CONNECTION = "+ping +select +time +wait"
_SCRIPTS = "+evalsha +script|load"
_DATA = (
    "+append +del +exists +get +getdel +set +pexpire +pttl"
    " +hdel +hexists +hget +hgetall +hincrby +hlen +hmget +hset +hsetnx"
    " +lindex +llen +lpop +lrange +rpush +sadd +smembers +type"
    " +xadd +xrange +xtrim"
    " +zadd +zcard +zcount +zrange +zrank +zrem +zremrangebyrank +zremrangebyscore +zscore"
)
_HINTS = "+publish +subscribe +unsubscribe &fnq:h:* &fnq:w:*"
_REQUESTS = "~fnq:{*}:* ~fnq:i:{*} ~fnq:i:{*}:*"
_TABLES = "~fnq:c:{*}* ~fnq:k:* ~fnq:l:{*}:*"

FRONT_END = f"{_CONNECTION} {_SCRIPTS} {_DATA} {_HINTS} {_REQUESTS} {_TABLES} ~fnq:epoch %R~fnq:gpus"
CONTROLLER = (
    f"{_CONNECTION} {_SCRIPTS} {_DATA} {_HINTS} {_REQUESTS} {_TABLES} ~fnq:epoch ~fnq:gpus ~fnq:leader"
    # The auditor's walk, and what a profile is checked by.
    " +scan +hscan +info +config|get"
)
# It may work on a request whose ID it has, and has no command that would tell it another one: none that lists what is
# in an order, a ledger or an account, none that reads a stream, and no channel but those of its kind.
SIDECAR = " ".join(
    (
        f"{_CONNECTION} +script|load +subscribe +unsubscribe &fnq:w:*",
        "(+publish &fnq:h:* &fnq:w:*)",
        "(+evalsha +type ~fnq:{*}:[rbpsqxdna] ~fnq:i:{*} ~fnq:i:{*}:*)",
        "(+del +exists +get +set +pexpire +pttl +hdel +hexists +hget +hincrby +hmget +hset +lindex +llen +lpop +rpush"
        " +xadd +xtrim ~fnq:{*}:[rbpsh])",
        "(+del +zadd +zrem +zscore ~fnq:{*}:[qxd])",
        "(+del +hincrby +pexpire ~fnq:{*}:m:*)",
        "(+append +del +getdel +pexpire ~fnq:{*}:e:*)",
        "(+del +hdel +hexists +hget +hincrby +hlen +hmget +hset +pexpire +pttl ~fnq:{*}:n ~fnq:{*}:n:*)",
        "(+del +zadd +zcount +pexpire +zremrangebyrank +zremrangebyscore ~fnq:{*}:a)",
        "(+evalsha +zadd ~fnq:{webhooks}:w)",
        "(+hset +hdel +hgetall +pexpire ~fnq:i:{*})",
        "(+del +sadd +smembers +pexpire ~fnq:i:{*}:*)",
        "(+get %R~fnq:epoch)",
    )
)
OPERATOR = "+@all ~* &*"

RULES: Mapping[str, str] = {
    "operator": OPERATOR,
    "api": FRONT_END,
    "controller": CONTROLLER,
    "sidecar": SIDECAR,
}
