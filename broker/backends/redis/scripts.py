"""Every change of a request as one Lua script, safe to run twice; time is Redis's own, in milliseconds.

Keys of one request share a hash tag, those of a version another, and an account's a third. What accepts a request, and
what ends it, changes all three at once: Redis has to be one that holds all keys, not a Redis Cluster.
    fnq:{<id>}:r   hash, the record      fnq:{<id>}:b   string, the packed outcome
    fnq:{<id>}:s   stream, the latest of a streamed body: entry <attempt>-<offset behind it>, fields d data · k kind
                   (0 bytes, 1 event) · c the container's ID of the event
    fnq:{<id>}:l   hash, what is kept of a dead request to start it again
    fnq:{<id>}:h   hash, what is to be told to its callback, from its end on
    fnq:{<id>}:p   list of the attempt's last updates: "<number> <percent> <partial>", oldest first, without gaps
A version's order is rebuildable:
    fnq:{<version>}:q   sorted set of waiting ids by order      fnq:{<version>}:x   the running ones, same score
    fnq:{<version>}:d   sorted set of ids by when they are due, of those with a queue deadline or without a place
    fnq:{<version>}:n   hash, the ledger (_ADMIT) of those queued, unless set aside, and running, by id as 16 bytes;
                        those that it has no room for are in the hashes fnq:{<version>}:n:<000 to fff>
    fnq:{<version>}:m:<minute>  hash, what ended in that minute (_NOTE), for a day
    fnq:{<version>}:e:<hour>    string, what ended in that hour and is not counted yet
An account's requests are bounded, and mended by whoever reads them:
    fnq:{<account>}:a   sorted set of ids, as 16 bytes, by acceptance in microseconds, no two alike
    fnq:{<account>}:n   its ledger. A request enters the version's first and leaves it last, so that what a crash left
                        behind in either is found in the version's
    fnq:{<account>}:g   the same of its dead letters, by when they died
    fnq:{<account>}:o   the same of its webhook deliveries, by when they were first taken
Those requests that have a callback and are not done with it:
    fnq:{webhooks}:w    sorted set of ids, as 16 bytes, by when to look at them in milliseconds; 0: now

Record fields: s state · a account · f function and v version, UUIDs as 16 bytes (keys.packed) · c created · d deadline
n attempt, none before the first one · p submitters, none while there is one · o nonce of the creating call
t lease token · l lease end · w worker · k the worker's channel · b started
e ended · m reason · h channels to hint, space separated · x hidden · Z not to be claimed before (POSTPONE)
Q queue deadline · U run timeout · I numbers of the result: "status cold_start inputs container upload"
D numbers of the attempts whose worker died, space separated: its lease ran out, and it did not come back to say no
C its callback: "<ms to keep the delivery> <states, separated by commas, or *> <url>"
K why it is dead · L its dead letter was made · V the request that it was started again as
G attempts that came to nothing, as JSON: [[number, worker, started, ended, how, why], …]; w is gone after such a one
and of a stream: u its head, packed · z bytes written · q offset up to which they were read · g until when a reader
means to be there · i channels of readers · j channel of a writer that waits, and how many unread bytes it waits for
and of progress: hs those channels that want every step · pn number of the last update · pi its sequence in the
attempt · pb bytes kept · pu number last given to a poll · pz nonce of that poll
A hint is the id, alone for what concerns all who wait, with ` 1` for progress and ` 2` for a step; with `/r` and `/w`
behind it, it is for readers and the writer of the stream. Behind the id of what was settled there may be a new line and
all of the record (finish): that saves who waits for it an exchange.
"""

from __future__ import annotations

import hashlib

from broker.activity import KEPT_MINUTES, STEPS
from broker.model import STREAM_CUT


class Script:
    """`call` makes the command; the SHA is known without asking the server."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
        SOURCES[self._sha] = source

    def call(self, keys: tuple[str, ...], *args: str | int | bytes) -> tuple[str | int | bytes, ...]:
        return ("EVALSHA", self._sha, len(keys), *keys, *args)


SOURCES: dict[str, str] = {}
"""Every script by its SHA."""

LEDGER_PAGES = 4096
_LEDGER_ROOM = 128
_UNCOUNTED_BYTES = 4096

_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

# updates(): where a request's progress is; in the record's slot, so that not every script has to name it.
_UPDATES = """
local function updates(r) return string.sub(r, 1, -2) .. 'p' end
local function tell(channels, hint)
  for channel in string.gmatch(channels or '', '%S+') do redis.call('PUBLISH', channel, hint) end
end
"""

# close(): an attempt came to nothing; `why` may be '' or nil. Of those, the newest 32 are kept.
_CLOSE = (
    _NOW
    + _UPDATES
    + """
local function close(r, how, at, why)
  local f = redis.call('HMGET', r, 'n', 'w', 'b', 'G')
  if not f[2] then return end
  local past = f[4] and cjson.decode(f[4]) or {}
  past[#past + 1] = {tonumber(f[1]), f[2], tonumber(f[3]), tonumber(at), how, why ~= '' and why or nil}
  if #past > 32 then table.remove(past, 1) end
  redis.call('HSET', r, 'G', cjson.encode(past))
  redis.call('HDEL', r, 'w')
end
"""
)

# Leases and deadlines that are further ahead were written by nobody: settings allow 300 s and 30 days. A request would
# be held by them as good as for ever.
_BOUNDS = "local longest_lease, longest_life = 3600000, 5184000000\n"

# Of outcomes, what hints carry.
_SHOWN_BYTES = 8192

# announce(): what is to be told to a callback. Its fields: C a f v s c b e m I as in the record · u its attempts
# d state of the delivery · x when it is due · k tries · j tries of this series · L the last of them, as JSON: [[number,
# at, took, status, error], …]
_ANNOUNCE = """
local function announce(r, state, reason)
  local f = redis.call('HMGET', r, 'C', 'a', 'f', 'v', 'c', 'b', 'I', 'n')
  local ttl, states = string.match(f[1], '^(%d+) (%S+) %S+$')
  if not ttl or (states ~= '*' and not string.find(',' .. states .. ',', ',' .. state .. ',', 1, true)) then return end
  local h = string.sub(r, 1, -2) .. 'h'
  redis.call('HSET', h, 'C', f[1], 'a', f[2], 'f', f[3], 'v', f[4], 's', state, 'c', f[5], 'b', f[6] or 0, 'e', now,
    'm', reason, 'I', f[7] or '', 'u', f[8] or 0, 'd', 'pending', 'x', now)
  redis.call('PEXPIRE', h, ttl)
end
"""

# over(): the only place where a record becomes terminal; returns its time to live. The record outlives every copy of
# its message. `f` is what whoever ends a request looks up of its record first, _FIELDS.
# Who waits is shown the record with the hint that it is over, where `told` (rebuild) is there, it is not large and
# there are no past attempts: the texts "<state> <attempt> <started> <ended> <numbers>", worker and `told`, each behind
# its length in two bytes, and then the outcome. Redis sends it as it answers: once it is on disk, if it has to be.
_FIELDS = "redis.call('HMGET', r, 's', 't', 'd', 'h', 'n', 'b', 'w', 'z', 'i', 'pn', 'C', 'G')"
_OVER = (
    _BOUNDS
    + f"local shown_bytes = {_SHOWN_BYTES}\n"
    + """
local function over(r, b, state, reason, retention, body, f, numbers, told)
  local life = math.min(longest_life, math.floor(tonumber(f[3]) or now) - now)
  local ttl, at = string.format('%d', math.max(retention, life + 180000)), string.format('%d', now)
  if numbers then
    redis.call('HSET', r, 's', state, 'e', at, 'm', reason, 'I', numbers)
  else
    redis.call('HSET', r, 's', state, 'e', at, 'm', reason)
  end
  redis.call('HDEL', r, 'h', 'k', 'l', 't')
  redis.call('PEXPIRE', r, ttl)
  if body then redis.call('SET', b, body, 'PX', ttl) end
  if f[4] then
    local hint = string.match(r, '{(.-)}')
    if told and not f[12] and f[5] and f[6] and f[7] and #body + #told <= shown_bytes then
      local line = table.concat({state, f[5], f[6], at, numbers}, ' ')
      hint = table.concat({hint, '\\n', struct.pack('>Hc0Hc0Hc0', #line, line, #f[7], f[7], #told, told), body})
    end
    for channel in string.gmatch(f[4], '%S+') do redis.call('PUBLISH', channel, hint) end
  end
  return ttl
end
"""
)

# finish(): ends any request, whatever there is of it. The key of the stream is made here, because few requests have
# one; it is in the record's slot.
_FINISH = (
    _CLOSE
    + _OVER
    + _ANNOUNCE
    + """
local terminal = {fulfilled=1, errored=1, expired=1, ['timed-out']=1, cancelled=1, dead=1, abandoned=1}
local function held(lease)
  local ends = tonumber(lease or 0)
  return ends and ends > now and ends <= now + longest_lease
end
local function finish(r, b, state, reason, retention, body, f, numbers, told)
  f = f or """
    + _FIELDS
    + """
  local id, worker = string.match(r, '{(.-)}'), nil
  if not body then
    local k, l, postponed = unpack(redis.call('HMGET', r, 'k', 'l', 'Z'))
    if f[1] == 'running' then
      worker = k
      if not held(l) then close(r, 'lost', tonumber(l) or now) end
    end
    if postponed then redis.call('DEL', b) end
  end
  local ttl = over(r, b, state, reason, retention, body, f, numbers, told)
  if f[8] or f[9] or f[10] then redis.call('HDEL', r, 'hs', 'i', 'j') end
  if f[8] then redis.call('PEXPIRE', string.sub(r, 1, -2) .. 's', ttl) end
  if f[10] then redis.call('PEXPIRE', updates(r), 300000) end
  if f[11] and state ~= 'abandoned' then announce(r, state, reason) end
  tell(f[9], id .. '/r')
  if worker then redis.call('PUBLISH', worker, id) end
  return state
end
local function overdue(r, b, retention)
  local f = redis.call('HMGET', r, 's', 'd', 'l', 'Q', 'n', 'Z')
  if terminal[f[1]] then return false end
  local due, reason = tonumber(f[2]), 'not finished before its deadline'
  if f[1] and (not due or due > now + longest_life) then error('no deadline') end
  if f[1] ~= 'queued' and (f[1] ~= 'running' or held(f[3])) then return false end
  if f[4] and tonumber(f[5] or 0) == 0 and not f[6] and tonumber(f[4]) < due then
    due, reason = tonumber(f[4]), 'no worker took it before its queue timeout'
  end
  if now < due then return false end
  local last = f[6] and redis.call('GET', b)
  if last then
    finish(r, b, 'errored', '', retention, last)
  else
    finish(r, b, 'expired', reason, retention)
  end
  return true
end
"""
)

# move(): an id from one order of a version to the other, where it keeps its place. Returns 0 if it had none.
_MOVE = """
local function move(from, to, id)
  local score = redis.call('ZSCORE', from, id) or redis.call('ZSCORE', to, id)
  local placed = score and 1 or 0
  if not score then
    local time = redis.call('TIME')
    score = time[1] * 1000000 + time[2]
  end
  redis.call('ZREM', from, id)
  redis.call('ZADD', to, score, id)
  return placed
end
"""

# A ledger is a hash of what its version or account has queued and running: bytes by member, with the account behind
# them in a version's, and `*` their sum. Entering and leaving are by member, so that neither ever counts twice.
# A hash of many takes two to three times the memory for each. What comes when _LEDGER_ROOM are in it goes into one of
# 4096 pages beside it, by the end of the member, and `#` is how many have gone there.
# fits(): '' if one more may enter, else which limit it meets; and, unless it is there already, {sum with it, how many
# are on pages with it if it goes there}. enter(): with that; returns the page.
_PAGE = f"""
local pages, ledger_room = {LEDGER_PAGES}, {_LEDGER_ROOM}
local function page(ledger, member)
  local high, low = string.byte(member, -2, -1)
  return string.format('%s:%03x', ledger, ((high or 0) * 256 + (low or 0)) % pages)
end
"""

_ADMIT = (
    _PAGE
    + """
local function fits(ledger, member, bytes, most, most_bytes, queued, longest)
  local f = redis.call('HMGET', ledger, member, '*', '#')
  if f[1] or (f[3] and redis.call('HEXISTS', page(ledger, member), member) == 1) then return '' end
  if queued and queued >= longest then return 'queued' end
  local here, paged = redis.call('HLEN', ledger) - (f[2] and 1 or 0) - (f[3] and 1 or 0), tonumber(f[3] or 0)
  if most > 0 and here + paged >= most then return 'requests' end
  local sum = tonumber(f[2] or 0) + bytes
  if most_bytes > 0 and sum > most_bytes then return 'bytes' end
  return '', {string.format('%d', sum), here >= ledger_room and string.format('%d', paged + 1)}
end
local function enter(ledger, member, entry, place)
  if not place then return nil end
  if not place[2] then
    redis.call('HSET', ledger, member, entry, '*', place[1])
    return nil
  end
  local to = page(ledger, member)
  redis.call('HSET', to, member, entry)
  redis.call('HSET', ledger, '*', place[1], '#', place[2])
  return to
end
"""
)

# A page whose ledger is gone counts for nothing any more. The last to leave takes the ledger along, whatever its sum:
# one that was damaged would hold room for ever.
_LEAVE = (
    """
local function leave(ledger, member)
  local held, from, counted = redis.call('HGET', ledger, member), ledger, true
  if not held then
"""
    + _PAGE
    + """
    from, counted = page(ledger, member), redis.call('HGET', ledger, '#')
    held = redis.call('HGET', from, member)
    if not held then return 0 end
  end
  redis.call('HDEL', from, member)
  if not counted then return 1 end
  if from ~= ledger and redis.call('HINCRBY', ledger, '#', -1) < 1 then redis.call('HDEL', ledger, '#') end
  if redis.call('HLEN', ledger) == 1 then
    redis.call('DEL', ledger)
  else
    redis.call('HINCRBY', ledger, '*', string.format('%d', 0 - string.match(held, '^%d+')))
  end
  return 1
end
"""
)

# note(): counts an end in its version's minute: <state> requests that ended so · a their attempts; and of times in ms
# w waits, r runs, s cold starts, i starts of instances, l what came before those: their sum as `w:`, and as `w<step>`
# how many fell into a step of broker.activity. `times` are "<accepted> <started> <cold> <start> <lead>", or 0 for each.
# One write for each end: they gather by the hour, as lines "<ended> <state> <attempts> <times>", and are counted
# together once there are some. Who reads takes in those that are not counted yet.
# No request may fail for its sake: an hour or a minute that is damaged is begun anew.
_NOTE = (
    """
local function note(ledger, state, attempts, times)
  local base = string.sub(ledger, 1, -2)
  local hour = string.format('%se:%d', base, math.floor(now / 3600000))
  local line = string.format('%d %s %s %s\\n', now, state, attempts, times)
"""
    + f"  local steps, kept_ms, uncounted_bytes = {STEPS}, {KEPT_MINUTES * 60_000}, {_UNCOUNTED_BYTES}"
    + """
  local bytes = redis.pcall('APPEND', hour, line)
  if type(bytes) ~= 'number' then
    if string.find(bytes.err, 'OOM', 1, true) then return end
    redis.pcall('DEL', hour)
    bytes = redis.pcall('APPEND', hour, line)
  end
  if bytes == #line then redis.pcall('PEXPIRE', hour, kept_ms + 3600000) end
  if type(bytes) ~= 'number' or bytes <= uncounted_bytes then return end
  local minutes, fields, present = {}, nil, nil
  local function add(field, by) fields[field] = (fields[field] or 0) + by end
  local function spent(kind, ms)
    ms = math.max(0, math.floor(ms))
    add(kind .. ':', ms)
    add(kind .. (ms > 1 and math.floor(math.log(ms) / math.log(2) * steps) or 0), 1)
  end
  local format = '(%d+) (%S+) (%d+) (%d+) (%d+) (%d+ %d+ %d+)\\n'
  for ended, state, attempts, accepted, started, others in string.gmatch(redis.call('GETDEL', hour), format) do
    local minute = math.floor(ended / 60000)
    if minute ~= present then
      present, fields = minute, minutes[minute] or {}
      minutes[minute] = fields
    end
    add(state, 1)
    if attempts ~= '0' then add('a', attempts) end
    if started ~= '0' then
      spent('w', started - accepted)
      spent('r', ended - started)
      if others ~= '0 0 0' then
        local cold_ms, start_ms, lead_ms = string.match(others, '(%d+) (%d+) (%d+)')
        if cold_ms ~= '0' then spent('s', cold_ms) end
        if start_ms ~= '0' then spent('i', start_ms) end
        if lead_ms ~= '0' then spent('l', lead_ms) end
      end
    end
  end
  for minute, counts in pairs(minutes) do
    local key = string.format('%sm:%d', base, minute)
    for field, by in pairs(counts) do
      by = string.format('%d', by)
      if type(redis.pcall('HINCRBY', key, field, by)) ~= 'number' then
        redis.call('DEL', key)
        redis.pcall('HINCRBY', key, field, by)
      end
    end
    redis.pcall('PEXPIRE', key, kept_ms)
  end
end
"""
)

# last(): a key that holds what lives for up to `ttl_ms` lives longer. Its end is put off a quarter further, so that
# most calls need not.
# trim(): of an order, the newest `limit` stay, and none for longer than `ttl_ms`. That is seen to at one of sixteen
# entries: it would take as long as the rest.
# file(): puts an id into such an order, at a place of its own.
_TRIM = """
local function last(key, ttl_ms)
  if redis.call('PTTL', key) < ttl_ms then redis.call('PEXPIRE', key, math.floor(ttl_ms * 1.25)) end
end
local function trim(place, at, limit, ttl_ms)
  last(place, ttl_ms)
  if at % 16 == 0 then
    local time = redis.call('TIME')
    redis.call('ZREMRANGEBYRANK', place, 0, -limit - 1)
    redis.call('ZREMRANGEBYSCORE', place, '-inf', time[1] * 1000000 + time[2] - ttl_ms * 1000)
  end
end
"""

_FILE = (
    _TRIM
    + """
local function file(place, id, at, limit, ttl_ms)
  if redis.call('ZADD', place, 'NX', at, id) == 0 then return end
  at = at + 0
  while redis.call('ZCOUNT', place, at, at) > 1 do
    at = at + 1
    redis.call('ZADD', place, 'XX', at, id)
  end
  trim(place, at, limit, ttl_ms)
end
"""
)

_CUT = f"local cut = '{STREAM_CUT}'\n"

# rebuild(): a record that is gone is made again from what its message told: the texts account, function, version and
# "<created> <deadline> <queue deadline> <ms to run>", each behind its length in two bytes, and then its callback.
# In one argument, because nearly no call needs it.
_REBUILD = (
    _FINISH
    + """
local function rebuild(r, retention, told)
  if redis.call('EXISTS', r) == 1 then return 0 end
  local account, fn, version, times, after = struct.unpack('>Hc0Hc0Hc0Hc0', told)
  local created, deadline, queue_deadline, run = string.match(times, '^(%d+) (%d+) (%d+) (%d+)$')
  local callback = string.sub(told, after)
  redis.call('HSET', r, 's', 'queued', 'a', account, 'f', fn, 'v', version, 'c', created, 'd', deadline)
  if queue_deadline ~= '0' then redis.call('HSET', r, 'Q', queue_deadline) end
  if run ~= '0' then redis.call('HSET', r, 'U', run) end
  if callback ~= '' then redis.call('HSET', r, 'C', callback) end
  redis.call('PEXPIRE', r, math.max(1, deadline - now) + retention)
  return 1
end
"""
)

# KEYS record waiting due version's-ledger list account's-ledger
# ARGV id member nonce channel account function version deadline_ms life_ms queue_ms run_ms bytes queue_limit
#   list's: limit ttl_ms · version's: most_requests most_bytes · callback('': none)
#   account's: most_requests most_bytes, 0: any number; none if it has none
# returns {1 if made now, state, created, deadline, function, version, queue_deadline, run_ms, rank if made now or 0}
#   or {-1, the limit that is met: queued, requests or bytes, version or account}; nothing was written then
# Its place in the account's list is its own by the clock, which has moved on since the last script.
CREATE = Script(
    _NOW
    + _ADMIT
    + _TRIM
    + """
local r, id, member, bytes = KEYS[1], ARGV[1], ARGV[2], ARGV[12] + 0
local f = redis.call('HMGET', r, 's', 'o', 'v')
local made, queued = f[1] == false, redis.call('ZCARD', KEYS[2])
if made or (f[1] == 'queued' and (f[3] == ARGV[7] or f[3] == string.match(KEYS[2], '{(.-)}'))) then
  local met, place = fits(KEYS[4], member, bytes, ARGV[16] + 0, ARGV[17] + 0, queued, tonumber(ARGV[13]))
  local met_too, place_too = '', nil
  if ARGV[19] then met_too, place_too = fits(KEYS[6], member, bytes, ARGV[19] + 0, ARGV[20] + 0) end
  if met == '' and met_too == '' then
    local at, ttl = time[1] .. string.format('%06d', time[2]), ARGV[15] + 0
    enter(KEYS[4], member, ARGV[12] .. ' ' .. ARGV[5], place)
    if place_too then
      local paged = enter(KEYS[6], member, ARGV[12], place_too)
      last(KEYS[6], ttl)
      if paged then last(paged, ttl) end
    end
    queued = queued + redis.call('ZADD', KEYS[2], 'NX', at, id)
    if ARGV[10] ~= '0' then redis.call('ZADD', KEYS[3], 'NX', now + ARGV[10], id) end
    if redis.call('ZADD', KEYS[5], 'NX', at, member) == 1 then trim(KEYS[5], time[2], ARGV[14] + 0, ttl) end
  elseif made then
    return {-1, met ~= '' and met or met_too, met ~= '' and 'version' or 'account'}
  end
end
if made then
  local queue, run = ARGV[10] ~= '0' and tostring(now + ARGV[10]) or '0', ARGV[11]
  local created, deadline = string.format('%d', now), string.format('%d', now + ARGV[8])
  if ARGV[4] ~= '' then
    redis.call('HSET', r, 's', 'queued', 'a', ARGV[5], 'f', ARGV[6], 'v', ARGV[7], 'c', created, 'd', deadline,
      'o', ARGV[3], 'h', ARGV[4])
  else
    redis.call('HSET', r, 's', 'queued', 'a', ARGV[5], 'f', ARGV[6], 'v', ARGV[7], 'c', created, 'd', deadline,
      'o', ARGV[3])
  end
  if queue ~= '0' then redis.call('HSET', r, 'Q', queue) end
  if run ~= '0' then redis.call('HSET', r, 'U', run) end
  if ARGV[18] ~= '' then redis.call('HSET', r, 'C', ARGV[18]) end
  redis.call('PEXPIRE', r, ARGV[9])
  return {1, 'queued', created, deadline, ARGV[6], ARGV[7], queue, run, queued}
end
local mine = 0
if f[2] == ARGV[3] then
  mine = 1
  if ARGV[4] ~= '' then redis.call('HSET', r, 'h', ARGV[4]) end
else
  redis.call('HSET', r, 'p', (redis.call('HGET', r, 'p') or 1) + 1)
end
f = redis.call('HMGET', r, 's', 'c', 'd', 'f', 'v', 'Q', 'U')
return {mine, f[1], f[2], f[3], f[4], f[5], f[6] or '0', f[7] or '0', 0}
"""
)

# Takes back what CREATE made when replicas turned out to be away; not from another submitter.
# KEYS record · ARGV nonce · returns 1 when it is gone
DISCARD = Script(
    """
local f = redis.call('HMGET', KEYS[1], 'o', 's', 'p')
if not f[2] then return 1 end
if f[1] ~= ARGV[1] or f[2] ~= 'queued' then return 0 end
if tonumber(f[3] or 1) > 1 then
  redis.call('HINCRBY', KEYS[1], 'p', -1)
  redis.call('HDEL', KEYS[1], 'o')
  return 0
end
return redis.call('DEL', KEYS[1])
"""
)

# KEYS record body · ARGV reason retention_ms · returns 1 when it will never start
ABANDON = Script(
    _FINISH
    + """
local f = redis.call('HMGET', KEYS[1], 's', 'n', 'p')
if f[1] == 'abandoned' then return 1 end
if f[1] and (f[1] ~= 'queued' or tonumber(f[2] or 0) > 0) then return 0 end
if f[1] and tonumber(f[3] or 1) > 1 then
  redis.call('HINCRBY', KEYS[1], 'p', -1)
  return 0
end
finish(KEYS[1], KEYS[2], 'abandoned', ARGV[1], ARGV[2] + 0)
return 1
"""
)

# KEYS record body · ARGV retention_ms channel whole poll steps
# returns nil, or {state, account, function, version, created, deadline, attempt, started, ended, worker, reason,
#   body if whole, 1 if it expired just now and 2 if it has a callback, queue_deadline, run_ms, past attempts,
#   numbers of the result, head of a stream that is not terminal, an update or '', 1 if no other poll was given it,
#   cause, redriven as}
# A `poll` is a nonce, '' for none, and takes an update; with `steps` (0|1) the channel is told of every step.
READ = Script(
    _FINISH
    + """
local function update(r, last, poll)
  local wanted, unread = last, 0
  if poll ~= '' then
    local f = redis.call('HMGET', r, 'pu', 'pz')
    local given = tonumber(f[1] or 0)
    if f[2] == poll then
      wanted, unread = given, 1
    elseif given < last then
      wanted, unread = math.max(given + 1, last - redis.call('LLEN', updates(r)) + 1), 1
      redis.call('HSET', r, 'pu', wanted, 'pz', poll)
    end
  end
  local found = redis.call('LINDEX', updates(r), wanted - last - 1)
  return found or '', found and unread or 0
end
local function fields(r)
  return redis.call('HMGET', r, 's', 'a', 'f', 'v', 'c', 'd', 'n', 'b', 'e', 'w', 'm', 'h', 'Q', 'U', 'G', 'I', 'u',
    'pn', 'K', 'V', 'x')
end
local f = fields(KEYS[1])
if not f[1] or f[21] then return nil end
local expired = not terminal[f[1]] and overdue(KEYS[1], KEYS[2], ARGV[1] + 0)
if expired then f = fields(KEYS[1]) end
local body, progress, unread = '', '', 0
if f[18] and (f[1] == 'running' or ARGV[5] == '1') then
  progress, unread = update(KEYS[1], tonumber(f[18]), f[1] == 'running' and ARGV[4] or '')
end
if terminal[f[1]] then
  body = ARGV[3] == '1' and redis.call('GET', KEYS[2]) or ''
elseif ARGV[2] ~= '' and not string.find(f[12] or '', ARGV[2], 1, true) and #(f[12] or '') < 512 then
  redis.call('HSET', KEYS[1], 'h', (f[12] and f[12] .. ' ' or '') .. ARGV[2])
end
if not terminal[f[1]] and ARGV[5] == '1' then
  local steps = redis.call('HGET', KEYS[1], 'hs') or ''
  if not string.find(steps, ARGV[2], 1, true) and #steps < 512 then
    redis.call('HSET', KEYS[1], 'hs', steps == '' and ARGV[2] or steps .. ' ' .. ARGV[2])
  end
end
return {f[1], f[2] or '', f[3] or '', f[4] or '', f[5] or '0', f[6] or '0', f[7] or '0', f[8] or '0', f[9] or '0',
  f[10] or '', f[11] or '', body, expired and 1 + redis.call('HEXISTS', KEYS[1], 'C') or 0,
  f[13] or '0', f[14] or '0', f[15] or '', f[16] or '',
  not terminal[f[1]] and f[17] or '', progress, unread, f[19] or '', f[20] or ''}
"""
)

# An attempt that began to stream is the last one: its reader cannot be given the same again.
# KEYS record body waiting running
# ARGV worker token channel lease_ms max_attempts retention_ms told max_deaths
# returns {verdict, state, attempt, wait_ms, and of a grant: remaining_ms, 1 if the record was rebuilt or had no place;
#   then of the attempt that this claim found lost: worker started ended; and since when the granted attempt runs}
# What runs is among what runs of its version afterwards.
# What POSTPONE kept goes when the next attempt starts.
# A new attempt begins without progress; the numbers go on, so that no listener takes its updates for old ones.
# The first attempt of a request that nothing else has happened to comes first: most need none of the other functions.
CLAIM = Script(
    _NOW
    + _MOVE
    + _BOUNDS
    + """
local r = KEYS[1]
local function fields() return redis.call('HMGET', r, 's', 'n', 't', 'l', 'd', 'Z', 'z', 'pn', 'hs', 'D', 'Q', 'b') end
local rebuilt, f = 0, fields()
local function place() return 1 - move(KEYS[3], KEYS[4], string.match(r, '{(.-)}')) end
local function begin(n)
  redis.call('HSET', r, 's', 'running', 'n', n, 't', ARGV[2], 'l', string.format('%d', now + ARGV[4]), 'w', ARGV[1],
    'k', ARGV[3], 'b', string.format('%d', now))
end
if f[1] == 'queued' and not (f[2] or f[6] or f[7] or f[8] or f[9] or f[10] or f[11]) then
  local left = (tonumber(f[5]) or now) - now
  if left > 0 and left <= longest_life then
    begin('1')
    return {'granted', 'running', 1, 0, left, place(), '', 0, 0, now}
  end
end
"""
    + _REBUILD
    + _CUT
    + """
if not f[1] then
  rebuilt = rebuild(r, ARGV[6] + 0, ARGV[7])
  f = fields()
end
local due = tonumber(f[5])
if not due or due <= now or due > now + longest_life or (f[11] and tonumber(f[11]) <= now) then
  overdue(r, KEYS[2], ARGV[6] + 0)
  f = fields()
end
local n = tonumber(f[2] or (f[1] ~= 'running' and 0))
if terminal[f[1]] then return {'settled', f[1], n, 0} end
if f[1] == 'running' and f[3] == ARGV[2] then
  redis.call('HSET', r, 'l', now + ARGV[4])
  return {'granted', 'running', n, 0, f[5] - now, math.max(rebuilt, place()), '', 0, 0, tonumber(f[12]) or 0}
end
if f[6] then
  if tonumber(f[6]) > now and tonumber(f[6]) <= tonumber(f[5]) then return {'held', 'queued', n, f[6] - now} end
  redis.call('HDEL', r, 'Z')
  redis.call('DEL', KEYS[2])
end
if f[1] == 'running' and held(f[4]) then
  place()
  return {'held', 'running', n, tonumber(f[4]) - now}
end
if f[7] then return {'settled', finish(r, KEYS[2], 'errored', cut, ARGV[6] + 0), n, 0} end
local died, deaths, lost = f[10] or '', 0, {}
if f[1] == 'running' then
  died = died .. (died == '' and '' or ' ') .. n
  lost = redis.call('HMGET', r, 'w', 'b', 'l')
end
for _ in string.gmatch(died, '%d+') do deaths = deaths + 1 end
local function ended(n) return {'settled', 'dead', n, 0, 0, 0, lost[1] or '', lost[2] or 0, lost[3] or 0} end
if deaths >= tonumber(ARGV[8]) then
  redis.call('HSET', r, 'K', 'worker-deaths')
  finish(r, KEYS[2], 'dead', 'the worker died in ' .. deaths .. ' attempts: it may be what kills them', ARGV[6] + 0)
  return ended(n)
end
if n >= tonumber(ARGV[5]) then
  redis.call('HSET', r, 'K', 'attempts-exhausted')
  finish(r, KEYS[2], 'dead', 'the worker or its container died in ' .. n .. ' attempts', ARGV[6] + 0)
  return ended(n)
end
if f[1] == 'running' then
  close(r, 'lost', f[4] or now)
  redis.call('HSET', r, 'D', died)
end
begin(string.format('%d', n + 1))
if f[8] then
  redis.call('DEL', updates(r))
  redis.call('HDEL', r, 'pi', 'pb')
  redis.call('HSET', r, 'pu', f[8])
end
if f[9] then tell(f[9], string.match(r, '{(.-)}') .. ' 2') end
return {'granted', 'running', n + 1, 0, f[5] - now, math.max(rebuilt, place()), lost[1] or '', lost[2] or 0,
  lost[3] or 0, now}
"""
)

# KEYS record body · ARGV retention_ms told
# returns {1 if the record was rebuilt, state}
RESTORE = Script(
    _REBUILD
    + """
local rebuilt = rebuild(KEYS[1], ARGV[1] + 0, ARGV[2])
overdue(KEYS[1], KEYS[2], ARGV[1] + 0)
return {rebuilt, redis.call('HGET', KEYS[1], 's')}
"""
)

# KEYS record · ARGV token lease_ms · returns the state for the holder of that token
RENEW = Script(
    _NOW
    + """
local f = redis.call('HMGET', KEYS[1], 's', 't')
if not f[1] then return 'running' end
if f[1] ~= 'running' then return f[1] end
if f[2] ~= ARGV[1] then return 'queued' end
redis.call('HSET', KEYS[1], 'l', now + ARGV[2])
return 'running'
"""
)

# Who gives back an attempt that was taken for lost is alive: that was no death.
# KEYS record body · ARGV token refund(0|1) retention_ms attempt reason · returns the state left behind
RELEASE = Script(
    _FINISH
    + _CUT
    + """
local f = redis.call('HMGET', KEYS[1], 's', 't', 'z', 'hs', 'D')
if not f[1] then return 'queued' end
if f[5] and f[2] ~= ARGV[1] then
  local left = {}
  for number in string.gmatch(f[5], '%d+') do
    if number ~= ARGV[4] then left[#left + 1] = number end
  end
  redis.call('HSET', KEYS[1], 'D', table.concat(left, ' '))
end
if f[1] == 'running' and f[2] == ARGV[1] then
  if f[3] then return finish(KEYS[1], KEYS[2], 'errored', cut, ARGV[3] + 0) end
  close(KEYS[1], ARGV[2] == '1' and 'returned' or 'failed', now, ARGV[5])
  redis.call('HINCRBY', KEYS[1], 'n', 0 - ARGV[2])
  redis.call('HDEL', KEYS[1], 't', 'l', 'w', 'k')
  redis.call('HSET', KEYS[1], 's', 'queued')
  tell(f[4], string.match(KEYS[1], '{(.-)}') .. ' 2')
  return 'queued'
end
return f[1]
"""
)

# KEYS record body · ARGV token wait_ms outcome retention_ms
# returns the state left behind; `running` when the deadline would come first
# The outcome is the result if the deadline comes before the next attempt (overdue).
POSTPONE = Script(
    _CLOSE
    + """
local f = redis.call('HMGET', KEYS[1], 's', 't', 'd', 'hs')
if not f[1] then return 'queued' end
if f[1] ~= 'running' or f[2] ~= ARGV[1] then return f[1] end
local till = now + ARGV[2]
if till >= tonumber(f[3]) then return 'running' end
close(KEYS[1], 'returned', now)
redis.call('HINCRBY', KEYS[1], 'n', -1)
redis.call('HDEL', KEYS[1], 't', 'l', 'w', 'k')
redis.call('HSET', KEYS[1], 's', 'queued', 'Z', till)
redis.call('SET', KEYS[2], ARGV[3], 'PX', f[3] - now + ARGV[4])
tell(f[4], string.match(KEYS[1], '{(.-)}') .. ' 2')
return 'queued'
"""
)

# KEYS record updates · ARGV token sequence percent partial most kept_bytes · returns as RENEW
REPORT = Script(
    _UPDATES
    + """
local r, p = KEYS[1], KEYS[2]
local f = redis.call('HMGET', r, 's', 't', 'pi', 'pn', 'pb', 'h')
if not f[1] then return 'running' end
if f[1] ~= 'running' then return f[1] end
if f[2] ~= ARGV[1] then return 'queued' end
if tonumber(ARGV[2]) <= tonumber(f[3] or 0) then return 'running' end
local number = tonumber(f[4] or 0) + 1
local update = number .. ' ' .. ARGV[3] .. ' ' .. ARGV[4]
local bytes, length = tonumber(f[5] or 0) + #update, redis.call('RPUSH', p, update)
while length > tonumber(ARGV[5]) or (length > 1 and bytes > tonumber(ARGV[6])) do
  bytes, length = bytes - #redis.call('LPOP', p), length - 1
end
redis.call('HSET', r, 'pi', ARGV[2], 'pn', number, 'pb', bytes)
redis.call('PEXPIRE', p, redis.call('PTTL', r))
tell(f[6], string.match(r, '{(.-)}') .. ' 1')
return 'running'
"""
)

# KEYS updates · ARGV after limit · returns the first `limit` of those numbered above `after`
UPDATES = Script(
    """
local first = tonumber(string.match(redis.call('LINDEX', KEYS[1], 0) or '', '^%d+'))
if not first then return {} end
local at = math.max(0, ARGV[1] + 1 - first)
return redis.call('LRANGE', KEYS[1], at, at + ARGV[2] - 1)
"""
)

# KEYS record body account's-ledger version's-ledger order...
# ARGV token attempt state outcome numbers retention_ms told id member times
# returns the state that stands; what is over has left its ledgers and the orders of its version as by LEAVE
# The orders are those of who waits, of what runs and of what is due.
# Most requests have neither a stream, nor progress, nor a callback: none of the other functions is made for them.
SETTLE = Script(
    _NOW
    + _OVER
    + _LEAVE
    + _NOTE
    + """
local r = KEYS[1]
local f = """
    + _FIELDS
    + """
local state, ended = f[1], true
if state == 'running' and f[2] == ARGV[1] and not (f[8] or f[9] or f[10] or f[11]) then
  over(r, KEYS[2], ARGV[3], '', ARGV[6] + 0, ARGV[4], f, ARGV[5], ARGV[7])
  state = ARGV[3]
else
"""
    + _REBUILD
    + """
  if not state and rebuild(r, ARGV[6] + 0, ARGV[7]) == 1 then
    redis.call('HSET', r, 's', 'running', 'n', ARGV[2], 't', ARGV[1])
    f = """
    + _FIELDS
    + """
    state = f[1]
  end
  if state == 'running' and f[2] == ARGV[1] then
    finish(r, KEYS[2], ARGV[3], '', ARGV[6] + 0, ARGV[4], f, ARGV[5], ARGV[7])
    state = ARGV[3]
  end
  ended = terminal[state]
end
if ended then
  if redis.call('HLEN', KEYS[3]) > 0 then leave(KEYS[3], ARGV[9]) end
  local held = leave(KEYS[4], ARGV[9])
  if redis.call('ZREM', KEYS[6], ARGV[8]) == 0 then redis.call('ZREM', KEYS[5], ARGV[8]) end
  local placed = redis.call('ZREM', KEYS[7], ARGV[8])
  if state ~= 'abandoned' and held + placed > 0 then note(KEYS[4], state, ARGV[2], ARGV[10]) end
end
return state
"""
)

# KEYS record body
# ARGV state reason retention_ms told cause('' for none)
# returns {verdict, state, wait_ms, attempts}
END = Script(
    _REBUILD
    + """
local r = KEYS[1]
rebuild(r, ARGV[3] + 0, ARGV[4])
local f = redis.call('HMGET', r, 's', 'l', 'n')
local attempts = tonumber(f[3]) or 0
if terminal[f[1]] then return {'settled', f[1], 0, attempts} end
if f[1] == 'running' and held(f[2]) then return {'held', f[1], tonumber(f[2]) - now, attempts} end
if ARGV[5] ~= '' then redis.call('HSET', r, 'K', ARGV[5]) end
return {'settled', finish(r, KEYS[2], ARGV[1], ARGV[2], ARGV[3] + 0), 0, attempts}
"""
)

# KEYS record body · ARGV reason retention_ms · returns nil, or the state that stood before
CANCEL = Script(
    _FINISH
    + """
overdue(KEYS[1], KEYS[2], ARGV[2] + 0)
local s = redis.call('HGET', KEYS[1], 's')
if s and not terminal[s] then finish(KEYS[1], KEYS[2], 'cancelled', ARGV[1], ARGV[2] + 0) end
return s
"""
)

# KEYS record body · hides a terminal record
FORGET = Script(
    _FINISH
    + """
if terminal[redis.call('HGET', KEYS[1], 's') or ''] then
  redis.call('HSET', KEYS[1], 'x', 1)
  redis.call('DEL', KEYS[2], string.sub(KEYS[1], 1, -2) .. 's')
end
return 1
"""
)

# -- streams: what was appended is found again by its offset, so that appending twice changes nothing ---------------

# KEYS record stream
# ARGV token channel most_unread most_kept head('' for none), then for each chunk: end kind event_id data
# returns {state, 1 if something before is missing, bytes unread, ms that nobody has read}
# The hint to readers carries what was appended if that is little: "<id>/r", then as lines [attempt, offset before,
# [[end, kind, event_id] of each chunk]] and the data of all. That saves them an exchange for each event.
STREAM_APPEND = Script(
    _NOW
    + """
local r, stream = KEYS[1], KEYS[2]
local f = redis.call('HMGET', r, 's', 't', 'n', 'z', 'q', 'g', 'i', 'j')
if not f[1] then return {'running', 1, 0, 0} end
if f[1] ~= 'running' then return {f[1], 0, 0, 0} end
if f[2] ~= ARGV[1] then return {'queued', 0, 0, 0} end
local written, news = tonumber(f[4] or 0), ARGV[5] ~= ''
local id = string.match(r, '{(.-)}')
if news then
  redis.call('HSET', r, 'u', ARGV[5])
  for channel in string.gmatch(redis.call('HGET', r, 'h') or '', '%S+') do redis.call('PUBLISH', channel, id) end
end
local before, told, data = written, {}, {}
for at = 6, #ARGV, 4 do
  local last = tonumber(ARGV[at])
  if last > written then
    if last - #ARGV[at + 3] ~= written then return {'running', 1, 0, 0} end
    redis.call('XADD', stream, f[3] .. '-' .. ARGV[at], 'd', ARGV[at + 3], 'k', ARGV[at + 1], 'c', ARGV[at + 2])
    written = last
    told[#told + 1] = {last, ARGV[at + 1], ARGV[at + 2]}
    data[#data + 1] = ARGV[at + 3]
  end
end
if written > before then
  news = true
  redis.call('HSET', r, 'z', string.format('%d', written))
  if before == 0 then redis.call('PEXPIRE', stream, math.max(1, redis.call('PTTL', r))) end
  local dropped = written - tonumber(ARGV[4])
  if dropped > 0 then redis.call('XTRIM', stream, 'MINID', f[3] .. '-' .. string.format('%d', dropped + 1)) end
end
if news and f[7] then
  local hint = id .. '/r'
  if ARGV[5] == '' and written - before <= 8192 then
    hint = table.concat({hint, cjson.encode({tonumber(f[3]), before, told}), table.concat(data)}, string.char(10))
  end
  for channel in string.gmatch(f[7], '%S+') do redis.call('PUBLISH', channel, hint) end
end
local unread, there = written - tonumber(f[5] or 0), tonumber(f[6] or 0)
if unread > tonumber(ARGV[3]) then
  if there == 0 then
    there = now
    redis.call('HSET', r, 'g', now)
  end
  redis.call('HSET', r, 'j', ARGV[2] .. ' ' .. math.floor(ARGV[3] / 2))
elseif f[8] then
  redis.call('HDEL', r, 'j')
end
return {'running', 0, unread, there > 0 and math.max(0, now - there) or 0}
"""
)

# KEYS record body stream · ARGV after most_bytes attended_ms channel silence_ms retention_ms step_bytes
# returns nil, or {state, attempt, bytes written, head, then for each chunk: end kind event_id data}
# It writes only what has changed by much, because a write may cost a flush of the disk before the answer leaves.
# A stream whose worker has fallen silent is ended here, because no other worker may be there to do it.
STREAM_READ = Script(
    _FINISH
    + _CUT
    + """
local r, after = KEYS[1], tonumber(ARGV[1])
local f = redis.call('HMGET', r, 's', 'n', 'z', 'u', 'l', 'g', 'i', 'j', 'x', 'q')
if not f[1] or f[9] then return nil end
local state, written = f[1], tonumber(f[3] or 0)
if state == 'running' and f[3] and tonumber(f[5] or 0) + ARGV[5] <= now then
  state = finish(r, KEYS[2], 'errored', cut, ARGV[6] + 0)
end
local answer, size, at = {state, tonumber(f[2] or 0), written, f[4] or ''}, 0, after
if at < written then
  local from = string.format('%s-%d', f[2], after + 1)
  while size < tonumber(ARGV[2]) do
    local entries = redis.call('XRANGE', KEYS[3], from, '+', 'COUNT', 32)
    for _, entry in ipairs(entries) do
      local data = entry[2][2]
      if size > 0 and size + #data > tonumber(ARGV[2]) then size = size + #data break end
      size, at = size + #data, tonumber(string.match(entry[1], '%-(%d+)$'))
      answer[#answer + 1] = at
      answer[#answer + 1] = entry[2][4]
      answer[#answer + 1] = entry[2][6]
      answer[#answer + 1] = data
    end
    if #entries < 32 then break end
    from = '(' .. entries[#entries][1]
  end
end
if terminal[state] then return answer end
local attended = tonumber(ARGV[3])
if attended > 0 then
  if f[8] or math.abs(after - tonumber(f[10] or 0)) >= tonumber(ARGV[7]) then redis.call('HSET', r, 'q', ARGV[1]) end
  if now + attended * 7 / 8 > tonumber(f[6] or 0) then redis.call('HSET', r, 'g', now + attended) end
  local writer, few = string.match(f[8] or '', '^(%S+) (%d+)$')
  if writer and written - after <= tonumber(few) then
    redis.call('PUBLISH', writer, string.match(r, '{(.-)}') .. '/w')
    redis.call('HDEL', r, 'j')
  end
end
if not string.find(f[7] or '', ARGV[4], 1, true) and #(f[7] or '') < 512 then
  redis.call('HSET', r, 'i', (f[7] and f[7] .. ' ' or '') .. ARGV[4])
end
return answer
"""
)

# KEYS record · ARGV 1 if a reader is expected back
STREAM_LEAVE = Script(
    _NOW
    + """
local there = redis.call('HGET', KEYS[1], 'g')
if not there then return 0 end
if ARGV[1] == '1' then return redis.call('HDEL', KEYS[1], 'g') end
redis.call('HSET', KEYS[1], 'g', math.min(now, tonumber(there)))
return 1
"""
)

# -- dead letters: a letter has the fields a account · f function · v version · s accepted · e died · n attempts
# c cause · m reason · u kept until · j envelope · b body · k key of a body in the blob store · z its size
# r the request that it is started again as · B since when that is settled · R since when it is accepted --------------

# KEYS record letter · ARGV envelope body body_key size ttl_ms
# returns when it died, in ms; 0 when there is nothing to keep it for. A letter is made once: the record outlives every
# copy of the message.
LETTER_KEEP = Script(
    _NOW
    + """
local r, l = KEYS[1], KEYS[2]
local died = redis.call('HGET', l, 'e')
if died then return tonumber(died) end
local f = redis.call('HMGET', r, 's', 'L', 'a', 'f', 'v', 'c', 'e', 'n', 'K', 'm')
if f[1] ~= 'dead' or f[2] then return 0 end
redis.call('HSET', r, 'L', 1)
redis.call('HSET', l, 'j', ARGV[1], 'b', ARGV[2], 'k', ARGV[3], 'z', ARGV[4], 'a', f[3], 'f', f[4], 'v', f[5],
  's', f[6], 'e', f[7], 'n', f[8] or 0, 'c', f[9] or 'dead-lettered', 'm', f[10] or '', 'u', now + ARGV[5])
redis.call('PEXPIRE', l, ARGV[5])
return tonumber(f[7])
"""
)

# KEYS letter · ARGV candidate after('' for none) known_ms · returns nil, or {id, 1 if done}
# What was settled longer than `known_ms` ago counts as done: its record may have come and gone.
LETTER_BIND = Script(
    _NOW
    + """
local f = redis.call('HMGET', KEYS[1], 'e', 'r', 'R', 'B')
if not f[1] then return nil end
if not f[2] or f[2] == ARGV[2] then
  redis.call('HSET', KEYS[1], 'r', ARGV[1], 'B', now)
  redis.call('HDEL', KEYS[1], 'R')
  return {ARGV[1], 0}
end
if not f[3] and now - f[4] > tonumber(ARGV[3]) then
  redis.call('HSET', KEYS[1], 'R', now)
  return {f[2], 1}
end
return {f[2], f[3] and 1 or 0}
"""
)

# KEYS letter · ARGV id
LETTER_UNBIND = Script(
    """
if redis.call('HGET', KEYS[1], 'r') ~= ARGV[1] then return 0 end
return redis.call('HDEL', KEYS[1], 'r', 'B', 'R')
"""
)

# KEYS letter record · ARGV id
LETTER_REDRIVEN = Script(
    _NOW
    + """
if redis.call('HGET', KEYS[1], 'r') == ARGV[1] then redis.call('HSETNX', KEYS[1], 'R', now) end
if redis.call('EXISTS', KEYS[2]) == 1 then redis.call('HSET', KEYS[2], 'V', ARGV[1]) end
return 1
"""
)

# -- webhooks ------------------------------------------------------------------------------------------------------

# KEYS webhooks · ARGV id wait_ms · looks at a request some time after it was accepted, unless it is looked at anyway
WEBHOOK_EXPECT = Script(
    _NOW
    + """
return redis.call('ZADD', KEYS[1], 'NX', now + ARGV[2], ARGV[1])
"""
)

# KEYS webhooks · ARGV id · it is looked at next, behind all that was due before
WEBHOOK_DUE = Script(
    _NOW
    + """
return redis.call('ZADD', KEYS[1], now, ARGV[1])
"""
)

# KEYS webhooks · ARGV limit lease_ms · returns {now, lease, id...}; the lease is the place that the ids have meanwhile
WEBHOOK_TAKE = Script(
    _NOW
    + """
local ids = redis.call('ZRANGE', KEYS[1], '-inf', now, 'BYSCORE', 'LIMIT', 0, ARGV[1])
local lease = now + ARGV[2]
for _, id in ipairs(ids) do redis.call('ZADD', KEYS[1], 'XX', lease, id) end
return {now, lease, unpack(ids)}
"""
)

# KEYS webhooks · returns {how many are due, for how long the first of them, in ms}; those at 0 are due since an unknown
# time
WEBHOOK_BACKLOG = Script(
    _NOW
    + """
local first = redis.call('ZRANGE', KEYS[1], '(0', now, 'BYSCORE', 'LIMIT', 0, 1, 'WITHSCORES')
return {redis.call('ZCOUNT', KEYS[1], '-inf', now), first[2] and now - tonumber(first[2]) or 0}
"""
)

# KEYS webhooks · ARGV lease, then for each: id wait_ms('' when done with it)
# Whoever asked for a look meanwhile has given it another place, and it keeps that.
WEBHOOK_RETURN = Script(
    _NOW
    + """
for at = 2, #ARGV, 2 do
  if tonumber(redis.call('ZSCORE', KEYS[1], ARGV[at]) or -1) == tonumber(ARGV[1]) then
    if ARGV[at + 1] == '' then
      redis.call('ZREM', KEYS[1], ARGV[at])
    else
      redis.call('ZADD', KEYS[1], 'XX', now + ARGV[at + 1], ARGV[at])
    end
  end
end
return 1
"""
)

# KEYS delivery · ARGV tries_before took_ms status error state wait_ms most_kept · returns 1 if it was noted
WEBHOOK_NOTE = Script(
    _NOW
    + """
local f = redis.call('HMGET', KEYS[1], 'd', 'k', 'j', 'L')
local before = tonumber(f[2] or 0)
if f[1] ~= 'pending' or before ~= tonumber(ARGV[1]) then return 0 end
local tries = f[4] and cjson.decode(f[4]) or {}
tries[#tries + 1] = {before + 1, now - ARGV[2], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]}
if #tries > tonumber(ARGV[7]) then table.remove(tries, 1) end
redis.call('HSET', KEYS[1], 'd', ARGV[5], 'k', before + 1, 'j', (f[3] or 0) + 1, 'x', now + ARGV[6],
  'L', cjson.encode(tries))
return 1
"""
)

# KEYS delivery · returns 1 if there is one, which is due now
WEBHOOK_AGAIN = Script(
    _NOW
    + """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], 'd', 'pending', 'j', 0, 'x', now)
return 1
"""
)

# KEYS key · ARGV id digest ttl_ms · returns the bound id, or '' when bound to another digest
REMEMBER_KEY = Script(
    """
local bound = redis.call('GET', KEYS[1])
if not bound then
  redis.call('SET', KEYS[1], ARGV[1] .. ' ' .. ARGV[2], 'PX', ARGV[3])
  return ARGV[1]
end
local id, digest = string.match(bound, '^(%S+) (%S+)$')
return digest == ARGV[2] and id or ''
"""
)

# KEYS key · ARGV id
FORGET_KEY = Script(
    """
local bound = redis.call('GET', KEYS[1])
if bound and string.match(bound, '^(%S+)') == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""
)

# KEYS order · ARGV id at_us(0: now) limit ttl_ms
FILE = Script(
    _NOW
    + _FILE
    + """
local at = ARGV[2] ~= '0' and ARGV[2] or string.format('%.0f', time[1] * 1000000 + time[2])
file(KEYS[1], ARGV[1], at, ARGV[3] + 0, ARGV[4] + 0)
return 1
"""
)

# KEYS account ledger · ARGV id accepted_us limit ttl_ms bytes
# puts a rebuilt request among those of its account, whatever the limits
INDEX = Script(
    _ADMIT
    + _FILE
    + """
local _, place = fits(KEYS[2], ARGV[1], ARGV[5] + 0, 0, 0)
local paged = enter(KEYS[2], ARGV[1], ARGV[5], place)
last(KEYS[2], ARGV[4] + 0)
if paged then last(paged, ARGV[4] + 0) end
file(KEYS[1], ARGV[1], ARGV[2] + 0, ARGV[3] + 0, ARGV[4] + 0)
return 1
"""
)

# KEYS ledger order... · ARGV member id, and of one that ended as something that counts: state attempts times
# Takes a request off its ledger and out of the orders of its version. What ended is noted once: with the ledger's
# entry, or, for a request that was set aside and has none, with that of the last order, of those that are due.
LEAVE = Script(
    _NOW
    + _NOTE
    + _LEAVE
    + """
local held, placed = leave(KEYS[1], ARGV[1]), 0
for i = 2, #KEYS do placed = redis.call('ZREM', KEYS[i], ARGV[2]) end
if ARGV[3] and held + placed > 0 then note(KEYS[1], ARGV[3], ARGV[4], ARGV[5]) end
return held
"""
)

# KEYS version's ledger · ARGV minutes · returns {the present minute, lines that are not counted yet, then for each of
# the last `minutes` that something was counted in: it, [field, value, …]}, as by note()
ACTIVITY = Script(
    _NOW
    + """
local last = math.floor(now / 60000)
local lines = {}
for hour = math.floor((last - ARGV[1] + 1) / 60), math.floor(last / 60) do
  local found = redis.pcall('GET', string.format('%se:%d', string.sub(KEYS[1], 1, -2), hour))
  lines[#lines + 1] = type(found) == 'string' and found or ''
end
local answer = {last, table.concat(lines)}
for minute = last - ARGV[1] + 1, last do
  local fields = redis.pcall('HGETALL', string.format('%sm:%d', string.sub(KEYS[1], 1, -2), minute))
  if not fields.err and #fields > 0 then
    answer[#answer + 1] = minute
    answer[#answer + 1] = fields
  end
end
return answer
"""
)

# KEYS version's ledger · ARGV member bytes account · enters a rebuilt request, whatever the limits
ENTER = Script(
    _ADMIT
    + """
local _, place = fits(KEYS[1], ARGV[1], ARGV[2] + 0, 0, 0)
enter(KEYS[1], ARGV[1], ARGV[2] .. ' ' .. ARGV[3], place)
return 1
"""
)

# Puts right what no release of ours left in a key that can be made anew (keys.rebuildable).
# KEYS key · ARGV zset, hash or string; or numbers, a hash of nothing else
# returns 1 if there was something to do
MEND = Script(
    """
local kind = redis.call('TYPE', KEYS[1]).ok
if kind == 'none' then return 0 end
if kind ~= (ARGV[1] == 'numbers' and 'hash' or ARGV[1]) then return redis.call('DEL', KEYS[1]) end
local entries = ARGV[1] ~= kind and redis.call('HGETALL', KEYS[1]) or {}
for i = 2, #entries, 2 do
  if not string.match(entries[i], '^%d+$') or #entries[i] > 15 then return redis.call('DEL', KEYS[1]) end
end
return 0
"""
)

# KEYS ledger · as MEND, with the pages
MEND_LEDGER = Script(
    _PAGE
    + """
local sum, strange = 0, false
local function count(key)
  local kind, found = redis.call('TYPE', key).ok, 0
  if kind ~= 'hash' then
    if kind ~= 'none' then
      strange = true
      redis.call('DEL', key)
    end
    return 0
  end
  local entries = redis.call('HGETALL', key)
  for i = 1, #entries, 2 do
    if key ~= KEYS[1] or (entries[i] ~= '*' and entries[i] ~= '#') then
      local bytes = string.match(entries[i + 1], '^%d+')
      if bytes and #bytes < 16 then
        sum, found = sum + bytes, found + 1
      else
        strange = true
        redis.call('HDEL', key, entries[i])
      end
    end
  end
  return found
end
local here, paged = count(KEYS[1]), 0
for at = 0, pages - 1 do paged = paged + count(string.format('%s:%03x', KEYS[1], at)) end
local right = {here + paged > 0 and string.format('%d', sum), paged > 0 and string.format('%d', paged)}
local were = redis.call('HMGET', KEYS[1], '*', '#')
for at, name in ipairs({'*', '#'}) do
  if were[at] ~= right[at] then
    strange = true
    redis.call('HDEL', KEYS[1], name)
    if right[at] then redis.call('HSET', KEYS[1], name, right[at]) end
  end
end
return strange and 1 or 0
"""
)

# KEYS record body updates stream · ARGV all to take it away whatever it says, end to put right an end and nothing else
# Before somebody who has the message of a request whose record is damaged goes on. An end that was shown stays one;
# anything else is taken away, as if the store had lost it, and the message makes it anew. Who has no message may put an
# end right, too.
# returns 1 if it was put right
HEAL = Script(
    _FINISH
    + """
local r = KEYS[1]
local state = redis.call('TYPE', r).ok == 'hash' and redis.call('HGET', r, 's')
if ARGV[1] == 'all' or not state or not terminal[state] then
  if ARGV[1] ~= 'end' then redis.call('DEL', unpack(KEYS)) end
  return 0
end
for name, fallback in pairs({c = now, d = now, n = 0, e = now}) do
  local number = redis.call('HGET', r, name)
  if not number or not string.match(number, '^%d+$') or #number > 15 then redis.call('HSET', r, name, fallback) end
end
redis.call('HDEL', r, 'b', 'p', 'w', 'Q', 'U', 'G', 'I', 'D', 'Z', 'u', 'pn')
if redis.call('TYPE', KEYS[2]).ok ~= 'string' then redis.call('DEL', KEYS[2]) end
return 1
"""
)

# KEYS from to · ARGV id · returns 0 if it had no place
MOVE = Script(
    _MOVE
    + """
return move(KEYS[1], KEYS[2], ARGV[1])
"""
)

# KEYS waiting running · returns {queued, running, age of the oldest in ms}
LOAD = Script(
    _NOW
    + """
local oldest = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
local age = oldest[2] and math.max(0, now - math.floor(oldest[2] / 1000)) or 0
return {redis.call('ZCARD', KEYS[1]), redis.call('ZCARD', KEYS[2]), age}
"""
)

# KEYS waiting running · ARGV most landmarks
# returns {now in ms, queued, running, then of each landmark: rank, score}
LINE = Script(
    _NOW
    + """
local queued = redis.call('ZCARD', KEYS[1])
local answer = {now, queued, redis.call('ZCARD', KEYS[2])}
local marks = math.min(queued, tonumber(ARGV[1]))
for mark = 1, marks do
  local rank = marks > 1 and math.floor((mark - 1) * (queued - 1) / (marks - 1)) or 0
  local found = redis.call('ZRANGE', KEYS[1], rank, rank, 'WITHSCORES')
  answer[#answer + 1] = rank + 1
  answer[#answer + 1] = found[2]
end
return answer
"""
)

# KEYS epoch · ARGV number for a new one · returns "<number>:<born>"
EPOCH = Script(
    _NOW
    + """
local number, born = string.match(redis.call('GET', KEYS[1]) or '', '^(%d+):(%d+)$')
if not number or tonumber(number) > 255 or tonumber(born) > now + 86400000 then
  number, born = ARGV[1], now
  redis.call('SET', KEYS[1], number .. ':' .. born)
end
return redis.call('GET', KEYS[1])
"""
)

# -- catalog: `fnq:c:{<table>}` holds "<revision> <item>" by key, and sorted sets beside it are the indexes ------

# KEYS table index... · ARGV key revision item · returns the new revision, or '' on a conflict
# Revisions begin at the time in microseconds, so that a row which is removed and made anew never has one of its old
# ones; as text, for Lua would round them.
PUT = Script(
    """
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000000 + time[2])
local stored = redis.call('HGET', KEYS[1], ARGV[1])
local revision, item = string.match(stored or '0 ', '^(%d+) (.*)$')
local new = ARGV[2] == '0' and now or string.format('%.0f', ARGV[2] + 1)
if item == ARGV[3] and (ARGV[2] == '0' or revision == new) then return revision end
if revision ~= ARGV[2] then return '' end
redis.call('HSET', KEYS[1], ARGV[1], new .. ' ' .. ARGV[3])
for i = 2, #KEYS do redis.call('ZADD', KEYS[i], 'NX', now, ARGV[1]) end
return new
"""
)

# KEYS table index... · ARGV key
DELETE = Script(
    """
for i = 2, #KEYS do redis.call('ZREM', KEYS[i], ARGV[1]) end
return redis.call('HDEL', KEYS[1], ARGV[1])
"""
)

# KEYS table index · returns the items of the index, oldest first; drops what an item no longer stored left behind
LIST = Script(
    """
local items = {}
for _, key in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
  local item = redis.call('HGET', KEYS[1], key)
  if item then items[#items + 1] = item else redis.call('ZREM', KEYS[2], key) end
end
return items
"""
)

# KEYS instances · ARGV id ttl_ms item
BEAT = Script(
    _NOW
    + """
redis.call('HSET', KEYS[1], ARGV[1], (now + ARGV[2]) .. ' ' .. ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""
)

# KEYS instances · returns the items that are alive
INSTANCES = Script(
    _NOW
    + """
local items = {}
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local ends, item = string.match(all[i + 1], '^(%d+) (.*)$')
  if ends and tonumber(ends) > now then items[#items + 1] = item else redis.call('HDEL', KEYS[1], all[i]) end
end
return items
"""
)

# KEYS leader · ARGV holder ttl_ms · returns 1 while the holder leads
LEAD = Script(
    """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] and redis.call('PTTL', KEYS[1]) > 0 then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
)

# KEYS leader · ARGV holder
RESIGN = Script(
    """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""
)

# -- counters: `fnq:l:{<partition>}:<counter>:<window in seconds>` is a hash of one window: what was taken in each part
# of it by the part's number, t the total, o the oldest part that holds anything ---------------------------------------

# KEYS window... · ARGV parts, then for each window: limit width_ms
# returns {1 if granted, then for each window: remaining, ms until more come}
# Only parts that have left since the last call are looked at: reading all 51 took five to ten times as long.
# A clock that was set back leaves parts in the future; they count until they have passed, or at once no more when
# even the oldest is further ahead than a window.
TAKE = Script(
    _NOW
    + """
local parts = tonumber(ARGV[1])
local function counts(key, from, to)
  local names = {}
  for part = from, to do names[#names + 1] = string.format('%d', part) end
  return redis.call('HMGET', key, unpack(names)), names
end
local function slide(key, w)
  local f = redis.call('HMGET', key, 't', 'o')
  w.used, w.oldest = tonumber(f[1] or 0), tonumber(f[2] or w.part)
  local first = w.part - parts
  if w.oldest + 3 * parts < first or w.oldest > w.part + parts then
    redis.call('DEL', key)
    w.used, w.oldest = 0, w.part
  elseif w.oldest < first then
    local left, names = counts(key, w.oldest, first - 1)
    for _, count in ipairs(left) do w.used = w.used - tonumber(count or 0) end
    redis.call('HDEL', key, unpack(names))
    w.oldest = first
    if w.used > 0 then
      for at, count in ipairs((counts(key, first, first + 2 * parts))) do
        if count then w.oldest = first + at - 1 break end
      end
    end
    redis.call('HSET', key, 't', w.used, 'o', w.oldest)
  end
end
local function add(key, w)
  if w.used == 0 or w.part < w.oldest then w.oldest = w.part end
  w.used = w.used + 1
  redis.call('HINCRBY', key, w.part, 1)
  redis.call('HSET', key, 't', w.used, 'o', w.oldest)
  redis.call('PEXPIRE', key, w.width * (parts + 1))
end
local function reset(key, w)
  if w.used == 0 then return 0 end
  local missing, last = w.used - w.limit + 1, w.oldest
  if missing > 1 then
    for at, count in ipairs((counts(key, w.oldest, w.oldest + 2 * parts))) do
      missing = missing - tonumber(count or 0)
      last = w.oldest + at - 1
      if missing <= 0 then break end
    end
  end
  return (last + parts + 1) * w.width - now
end
local granted, windows, answer = 1, {}, {}
for i, key in ipairs(KEYS) do
  local w = {limit = tonumber(ARGV[2 * i]), width = tonumber(ARGV[2 * i + 1])}
  w.part = math.floor(now / w.width)
  slide(key, w)
  if w.used >= w.limit then granted = 0 end
  windows[i] = w
end
answer[1] = granted
for i, key in ipairs(KEYS) do
  local w = windows[i]
  if granted == 1 then add(key, w) end
  answer[#answer + 1] = math.max(0, w.limit - w.used)
  answer[#answer + 1] = reset(key, w)
end
return answer
"""
)

# -- what instances write: fnq:{<version>}:y is a stream of batches (field d, packed), fnq:{<version>}:z a hash: up to
# where each part of each instance was copied, by "<instance>/<part>", and under # the bytes of the stream; both only
# while somebody looks, as fnq:{logs}:w says: a sorted set of "<version> <instance> <account>" by until when -----------

# KEYS looks stream positions · ARGV version instance account ttl_ms most most_of_account
# returns 1, or 0: there are as many as may be
LOOK = Script(
    _NOW
    + """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local own = table.concat({ARGV[1], ARGV[2], ARGV[3]}, ' ')
local all, mine, known, begun = redis.call('ZRANGE', KEYS[1], 0, -1), 0, false, false
for _, look in ipairs(all) do
  local version, account = string.match(look, '^(%S+) %S+ (.*)$')
  known, begun = known or look == own, begun or version == ARGV[1]
  if account == ARGV[3] then mine = mine + 1 end
end
if not known and (#all >= tonumber(ARGV[5]) or mine >= tonumber(ARGV[6])) then return 0 end
if not begun then redis.call('DEL', KEYS[2], KEYS[3]) end
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[4]), own)
redis.call('PEXPIRE', KEYS[1], 86400000)
return 1
"""
)

# KEYS looks · returns {look...}
LOOKS = Script(
    _NOW
    + """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
return redis.call('ZRANGE', KEYS[1], 0, -1)
"""
)

# KEYS stream positions · ARGV part before after batch ('': none) most_bytes keep_ms
# returns 1, or 0 where the part's position is not `before`
COPY_LOG = Script(
    """
if (redis.call('HGET', KEYS[2], ARGV[1]) or '') ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
if ARGV[4] ~= '' then
  redis.call('XADD', KEYS[1], '*', 'd', ARGV[4])
  local over = redis.call('HINCRBY', KEYS[2], '#', #ARGV[4]) - tonumber(ARGV[5])
  if over > 0 then
    local oldest, gone, first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 256), 0, nil
    for at = 1, #oldest - 1 do
      if gone >= over then break end
      gone, first = gone + #oldest[at][2][2], oldest[at + 1][1]
    end
    if first then
      redis.call('XTRIM', KEYS[1], 'MINID', first)
      redis.call('HINCRBY', KEYS[2], '#', -gone)
    end
  end
end
redis.call('PEXPIRE', KEYS[1], ARGV[6])
redis.call('PEXPIRE', KEYS[2], ARGV[6])
return 1
"""
)
