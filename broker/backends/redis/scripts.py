"""Every change of a request as one Lua script, safe to run twice; time is Redis's own, in milliseconds.

Keys of one request share a hash tag, so that they live in one slot of a Redis Cluster:
    fnq:{<id>}:r   hash, the record      fnq:{<id>}:b   string, the packed outcome
    fnq:{<id>}:s   stream, the latest of a streamed body: entry <attempt>-<offset behind it>, fields d data · k kind
                   (0 bytes, 1 event) · c the container's ID of the event
    fnq:{<id>}:l   hash, what is kept of a dead request to start it again
    fnq:{<id>}:p   list of the attempt's last updates: "<number> <percent> <partial>", oldest first, without gaps
A version's order is another slot, best effort and rebuildable:
    fnq:{<version>}:q   sorted set of waiting ids by order      fnq:{<version>}:x   the running ones, same score
    fnq:{<version>}:d   sorted set of ids by when they are due, of those with a queue deadline or without a place
    fnq:{<version>}:n   hash, the ledger (_ADMIT) of those queued, unless set aside, and running, by id as 16 bytes
    fnq:{<version>}:m:<minute>   hash, what ended in that minute (LEAVE), for a day
An account's requests are another one, bounded, and mended by whoever reads it:
    fnq:{<account>}:a   sorted set of ids, as 16 bytes, by acceptance in microseconds, no two alike
    fnq:{<account>}:n   its ledger. A request enters the version's first and leaves it last, so that what a crash left
                        behind in either is found in the version's
    fnq:{<account>}:g   the same of its dead letters, by when they died

Record fields: s state · a account · f function · v version · c created · d deadline · n attempt · p submitters
o nonce of the creating call · t lease token · l lease end · w worker · k the worker's channel · b started
e ended · m reason · h channels to hint, space separated · x hidden · Z not to be claimed before (POSTPONE)
Q queue deadline · U run timeout · I numbers of the result: "status cold_start inputs container upload"
D numbers of the attempts whose worker died, space separated: its lease ran out, and it did not come back to say no
K why it is dead · L its dead letter was made · V the request that it was started again as
G attempts that came to nothing, as JSON: [[number, worker, started, ended, how], …]; w is gone after such a one
and of a stream: u its head, packed · z bytes written · q offset up to which they were read · g until when a reader
means to be there · i channels of readers · j channel of a writer that waits, and how many unread bytes it waits for
and of progress: hs those channels that want every step · pn number of the last update · pi its sequence in the
attempt · pb bytes kept · pu number last given to a poll · pz nonce of that poll
A hint is the id, alone for what concerns all who wait, with ` 1` for progress and ` 2` for a step; with `/r` and `/w`
behind it, it is for readers and the writer of the stream.
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

# close(): an attempt came to nothing. Of those, the newest 32 are kept.
_CLOSE = (
    _NOW
    + _UPDATES
    + """
local function close(r, how, at)
  local f = redis.call('HMGET', r, 'n', 'w', 'b', 'G')
  if not f[2] then return end
  local past = f[4] and cjson.decode(f[4]) or {}
  past[#past + 1] = {tonumber(f[1]), f[2], tonumber(f[3]), tonumber(at), how}
  if #past > 32 then table.remove(past, 1) end
  redis.call('HSET', r, 'G', cjson.encode(past))
  redis.call('HDEL', r, 'w')
end
"""
)

# Leases and deadlines that are further ahead were written by nobody: settings allow 300 s and 30 days. A request would
# be held by them as good as for ever.
_BOUNDS = "local longest_lease, longest_life = 3600000, 5184000000\n"

# finish(): the only place where a record becomes terminal. The record outlives every copy of its message. The key of
# the stream is made here, because few requests have one; it is in the record's slot.
_FINISH = (
    _CLOSE
    + _BOUNDS
    + """
local terminal = {fulfilled=1, errored=1, expired=1, ['timed-out']=1, cancelled=1, dead=1, abandoned=1}
local function held(lease)
  local ends = tonumber(lease or 0)
  return ends and ends > now and ends <= now + longest_lease
end
local function finish(r, b, state, reason, retention, body)
  local old = redis.call('HMGET', r, 'd', 'h', 'k', 's', 'l', 'Z', 'i', 'z', 'pn')
  if old[4] == 'running' and not body and not held(old[5]) then close(r, 'lost', tonumber(old[5]) or now) end
  local id = string.match(r, '{(.-)}')
  local life = math.min(longest_life, math.floor(tonumber(old[1]) or now) - now)
  local ttl = math.max(retention, life + 180000)
  redis.call('HSET', r, 's', state, 'e', now, 'm', reason)
  redis.call('HDEL', r, 'h', 'hs', 'k', 'l', 't', 'i', 'j')
  redis.call('PEXPIRE', r, ttl)
  if old[8] then redis.call('PEXPIRE', string.sub(r, 1, -2) .. 's', ttl) end
  if body then redis.call('SET', b, body, 'PX', ttl) elseif old[6] then redis.call('DEL', b) end
  if old[9] then redis.call('PEXPIRE', updates(r), 300000) end
  tell(old[2], id)
  tell(old[7], id .. '/r')
  if old[3] and old[4] == 'running' and not body then redis.call('PUBLISH', old[3], id) end
  return state
end
local function overdue(r, b, retention)
  local f = redis.call('HMGET', r, 's', 'd', 'l', 'Q', 'n', 'Z')
  if terminal[f[1]] then return false end
  local due, reason = tonumber(f[2]), 'not finished before its deadline'
  if f[1] and (not due or due > now + longest_life) then error('no deadline') end
  if f[1] ~= 'queued' and (f[1] ~= 'running' or held(f[3])) then return false end
  if f[4] and tonumber(f[5]) == 0 and not f[6] and tonumber(f[4]) < due then
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

_CUT = f"local cut = '{STREAM_CUT}'\n"

# rebuild(): a record that is gone is made again from what its message carries.
_REBUILD = (
    _FINISH
    + """
local function rebuild(r, retention, account, fn, version, created, deadline, queue_deadline, run)
  if redis.call('EXISTS', r) == 1 then return 0 end
  redis.call('HSET', r, 's', 'queued', 'a', account, 'f', fn, 'v', version, 'c', created, 'd', deadline, 'n', 0, 'p', 1)
  if queue_deadline ~= '0' then redis.call('HSET', r, 'Q', queue_deadline) end
  if run ~= '0' then redis.call('HSET', r, 'U', run) end
  redis.call('PEXPIRE', r, math.max(1, deadline - now) + retention)
  return 1
end
"""
)

# KEYS record · ARGV account function version deadline_ms retention_ms nonce channel queue_ms run_ms
# returns {1 if made now, state, created, deadline, function, version, queue_deadline, run_ms}
CREATE = Script(
    _NOW
    + """
local r = KEYS[1]
local f = redis.call('HMGET', r, 's', 'o')
if not f[1] then
  local deadline, queue, run = now + ARGV[4], ARGV[8] ~= '0' and now + ARGV[8] or '0', ARGV[9]
  local fields = {'s', 'queued', 'a', ARGV[1], 'f', ARGV[2], 'v', ARGV[3], 'c', now, 'd', deadline, 'n', 0, 'p', 1,
    'o', ARGV[6]}
  local function add(name, value)
    fields[#fields + 1] = name
    fields[#fields + 1] = value
  end
  if queue ~= '0' then add('Q', queue) end
  if run ~= '0' then add('U', run) end
  if ARGV[7] ~= '' then add('h', ARGV[7]) end
  redis.call('HSET', r, unpack(fields))
  redis.call('PEXPIRE', r, ARGV[4] + ARGV[5])
  return {1, 'queued', tostring(now), tostring(deadline), ARGV[2], ARGV[3], tostring(queue), run}
end
local made = 0
if f[2] == ARGV[6] then
  made = 1
  if ARGV[7] ~= '' then redis.call('HSET', r, 'h', ARGV[7]) end
else
  redis.call('HINCRBY', r, 'p', 1)
end
f = redis.call('HMGET', r, 's', 'c', 'd', 'f', 'v', 'Q', 'U')
return {made, f[1], f[2], f[3], f[4], f[5], f[6] or '0', f[7] or '0'}
"""
)

# Takes back what CREATE made when the queue turned out to be full, or replicas away; not from another submitter.
# KEYS record · ARGV nonce · returns 1 when it is gone
DISCARD = Script(
    """
local f = redis.call('HMGET', KEYS[1], 'o', 's', 'p')
if not f[2] then return 1 end
if f[1] ~= ARGV[1] or f[2] ~= 'queued' then return 0 end
if tonumber(f[3]) > 1 then
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
if f[1] and (f[1] ~= 'queued' or tonumber(f[2]) > 0) then return 0 end
if f[1] and tonumber(f[3]) > 1 then
  redis.call('HINCRBY', KEYS[1], 'p', -1)
  return 0
end
finish(KEYS[1], KEYS[2], 'abandoned', ARGV[1], ARGV[2] + 0)
return 1
"""
)

# KEYS record body · ARGV retention_ms channel whole poll steps
# returns nil, or {state, account, function, version, created, deadline, attempt, started, ended, worker, reason,
#   body if whole, 1 if it expired just now, queue_deadline, run_ms, past attempts, numbers of the result,
#   head of a stream that is not terminal, an update or '', 1 if no other poll was given it, cause, redriven as}
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
local known = redis.call('HMGET', KEYS[1], 's', 'x')
if not known[1] or known[2] then return nil end
local expired = not terminal[known[1]] and overdue(KEYS[1], KEYS[2], ARGV[1] + 0)
local f = redis.call('HMGET', KEYS[1], 's', 'a', 'f', 'v', 'c', 'd', 'n', 'b', 'e', 'w', 'm', 'h', 'Q', 'U', 'G', 'I',
  'u', 'pn', 'K', 'V')
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
  f[10] or '', f[11] or '', body, expired and 1 or 0, f[13] or '0', f[14] or '0', f[15] or '', f[16] or '',
  not terminal[f[1]] and f[17] or '', progress, unread, f[19] or '', f[20] or ''}
"""
)

# An attempt that began to stream is the last one: its reader cannot be given the same again.
# KEYS record body
# ARGV worker token channel lease_ms max_attempts retention_ms account function version created deadline
#   queue_deadline run_ms max_deaths
# returns {verdict, state, attempt, wait_ms, and of a grant: remaining_ms, 1 if the record was rebuilt; then of the
#   attempt that this claim found lost: worker started ended; and since when the attempt that is granted runs}
# What POSTPONE kept goes when the next attempt starts.
# A new attempt begins without progress; the numbers go on, so that no listener takes its updates for old ones.
CLAIM = Script(
    _REBUILD
    + _CUT
    + """
local r = KEYS[1]
local rebuilt = rebuild(r, ARGV[6] + 0, ARGV[7], ARGV[8], ARGV[9], ARGV[10], ARGV[11] + 0, ARGV[12], ARGV[13])
overdue(r, KEYS[2], ARGV[6] + 0)
local f = redis.call('HMGET', r, 's', 'n', 't', 'l', 'd', 'Z', 'z', 'pn', 'hs', 'D', 'b')
local n = tonumber(f[2])
if terminal[f[1]] then return {'settled', f[1], n, 0} end
if f[1] == 'running' and f[3] == ARGV[2] then
  redis.call('HSET', r, 'l', now + ARGV[4])
  return {'granted', 'running', n, 0, f[5] - now, rebuilt, '', 0, 0, tonumber(f[11]) or 0}
end
if f[6] then
  if tonumber(f[6]) > now and tonumber(f[6]) <= tonumber(f[5]) then return {'held', 'queued', n, f[6] - now} end
  redis.call('HDEL', r, 'Z')
  redis.call('DEL', KEYS[2])
end
if f[1] == 'running' and held(f[4]) then
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
if deaths >= tonumber(ARGV[14]) then
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
redis.call('HSET', r, 's', 'running', 'n', n + 1, 't', ARGV[2], 'l', now + ARGV[4], 'w', ARGV[1], 'k', ARGV[3],
  'b', now)
if f[8] then
  redis.call('DEL', updates(r))
  redis.call('HDEL', r, 'pi', 'pb')
  redis.call('HSET', r, 'pu', f[8])
end
if f[9] then tell(f[9], string.match(r, '{(.-)}') .. ' 2') end
return {'granted', 'running', n + 1, 0, f[5] - now, rebuilt, lost[1] or '', lost[2] or 0, lost[3] or 0, now}
"""
)

# KEYS record body · ARGV retention_ms account function version created deadline queue_deadline run_ms
# returns {1 if the record was rebuilt, state}
RESTORE = Script(
    _REBUILD
    + """
local rebuilt = rebuild(KEYS[1], ARGV[1] + 0, ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6] + 0, ARGV[7], ARGV[8])
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
# KEYS record body · ARGV token refund(0|1) retention_ms attempt · returns the state left behind
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
  close(KEYS[1], ARGV[2] == '1' and 'returned' or 'failed', now)
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

# KEYS record body
# ARGV token attempt state outcome numbers retention_ms account function version created deadline queue_deadline run_ms
# returns the state that stands
SETTLE = Script(
    _REBUILD
    + """
local r = KEYS[1]
if redis.call('EXISTS', r) == 0 then
  rebuild(r, ARGV[6] + 0, ARGV[7], ARGV[8], ARGV[9], ARGV[10], ARGV[11] + 0, ARGV[12], ARGV[13])
  redis.call('HSET', r, 's', 'running', 'n', ARGV[2], 't', ARGV[1])
end
local f = redis.call('HMGET', r, 's', 't')
if f[1] == 'running' and f[2] == ARGV[1] then
  redis.call('HSET', r, 'I', ARGV[5])
  return finish(r, KEYS[2], ARGV[3], '', ARGV[6] + 0, ARGV[4])
end
return f[1]
"""
)

# KEYS record body
# ARGV state reason retention_ms account function version created deadline queue_deadline run_ms cause('' for none)
# returns {verdict, state, wait_ms, attempts}
END = Script(
    _REBUILD
    + """
local r = KEYS[1]
rebuild(r, ARGV[3] + 0, ARGV[4], ARGV[5], ARGV[6], ARGV[7], ARGV[8] + 0, ARGV[9], ARGV[10])
local f = redis.call('HMGET', r, 's', 'l', 'n')
local attempts = tonumber(f[3]) or 0
if terminal[f[1]] then return {'settled', f[1], 0, attempts} end
if f[1] == 'running' and held(f[2]) then return {'held', f[1], tonumber(f[2]) - now, attempts} end
if ARGV[11] ~= '' then redis.call('HSET', r, 'K', ARGV[11]) end
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
  's', f[6], 'e', f[7], 'n', f[8], 'c', f[9] or 'dead-lettered', 'm', f[10] or '', 'u', now + ARGV[5])
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

# admit(): a ledger is a hash of what its version or account has queued and running: bytes by member, with the account
# behind them in a version's, and `*` their sum. Entering and leaving are by member, so that neither ever counts twice.
_ADMIT = """
local function admit(ledger, member, bytes, entry, most, most_bytes)
  if redis.call('HEXISTS', ledger, member) == 1 then return '' end
  if most > 0 and redis.call('HLEN', ledger) - 1 >= most then return 'requests' end
  if most_bytes > 0 and tonumber(redis.call('HGET', ledger, '*') or 0) + bytes > most_bytes then return 'bytes' end
  redis.call('HSET', ledger, member, entry)
  redis.call('HINCRBY', ledger, '*', bytes)
  return ''
end
"""

# KEYS waiting due ledger · ARGV id limit queue_ms member bytes account most_requests most_bytes (0: any number)
# returns '' when there is room, else which limit is met: queued, requests or bytes
ENQUEUE = Script(
    _NOW
    + _ADMIT
    + """
if redis.call('ZSCORE', KEYS[1], ARGV[1]) then return '' end
if redis.call('HEXISTS', KEYS[3], ARGV[4]) == 0 and redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then
  return 'queued'
end
local met = admit(KEYS[3], ARGV[4], ARGV[5] + 0, ARGV[5] .. ' ' .. ARGV[6], ARGV[7] + 0, ARGV[8] + 0)
if met ~= '' then return met end
redis.call('ZADD', KEYS[1], time[1] * 1000000 + time[2], ARGV[1])
if ARGV[3] ~= '0' then redis.call('ZADD', KEYS[2], now + ARGV[3], ARGV[1]) end
return ''
"""
)

# file(): puts an id into an order, at a place of its own, of which the newest `limit` stay, and none for longer than
# `ttl_ms`. That is seen to at one of sixteen: it would take as long as the rest.
_FILE = """
local function file(place, id, at_us, limit, ttl_ms)
  local time = redis.call('TIME')
  local now = time[1] * 1000000 + time[2]
  local at = at_us == 0 and now or at_us
  if redis.call('ZADD', place, 'NX', at, id) == 0 then return end
  while redis.call('ZCOUNT', place, at, at) > 1 do
    at = at + 1
    redis.call('ZADD', place, 'XX', at, id)
  end
  redis.call('PEXPIRE', place, ttl_ms)
  if at % 16 == 0 then
    redis.call('ZREMRANGEBYRANK', place, 0, -limit - 1)
    redis.call('ZREMRANGEBYSCORE', place, '-inf', now - ttl_ms * 1000)
  end
end
"""

# KEYS order · ARGV id at_us limit ttl_ms
FILE = Script(
    _FILE
    + """
file(KEYS[1], ARGV[1], ARGV[2] + 0, ARGV[3] + 0, ARGV[4] + 0)
return 1
"""
)

# KEYS account ledger · ARGV id accepted_us(0: now) limit ttl_ms bytes most_requests most_bytes (0: any number)
# returns as ENQUEUE · puts a request among those of its account
INDEX = Script(
    _ADMIT
    + _FILE
    + """
local met = admit(KEYS[2], ARGV[1], ARGV[5] + 0, ARGV[5], ARGV[6] + 0, ARGV[7] + 0)
if met ~= '' then return met end
if redis.call('PTTL', KEYS[2]) < tonumber(ARGV[4]) then redis.call('PEXPIRE', KEYS[2], ARGV[4]) end
file(KEYS[1], ARGV[1], ARGV[2] + 0, ARGV[3] + 0, ARGV[4] + 0)
return ''
"""
)

# note(): counts an end in its version's minute: <state> requests that ended so · a their attempts; and of times in ms
# w waits, r runs, s cold starts: their sum as `w:`, and as `w<step>` how many fell into a step of broker.activity.
# No request may fail for its sake: a minute that is damaged is begun anew.
_NOTE = (
    _NOW
    + f"local steps, kept_ms = {STEPS}, {KEPT_MINUTES * 60_000}\n"
    + """
local function note(ledger, state, attempts, accepted, started, cold_ms)
  local minute = string.format('%sm:%d', string.sub(ledger, 1, -2), math.floor(now / 60000))
  local function add(field, by)
    local sum = redis.pcall('HINCRBY', minute, field, by)
    if type(sum) == 'number' then return sum end
    if not string.find(sum.err, 'OOM', 1, true) then redis.call('DEL', minute) end
    return 0
  end
  local function spent(kind, ms)
    ms = math.max(0, math.floor(ms))
    add(kind .. ':', string.format('%d', ms))
    add(kind .. (ms > 1 and math.floor(math.log(ms) / math.log(2) * steps) or 0), 1)
  end
  if add(state, 1) == 1 then redis.pcall('PEXPIRE', minute, kept_ms) end
  if attempts ~= '0' then add('a', attempts) end
  if started == '0' then return end
  spent('w', started - accepted)
  spent('r', now - started)
  if cold_ms ~= '0' then spent('s', cold_ms) end
end
"""
)

# KEYS ledger order... · ARGV member id, and of one that ended as something that counts: state attempts, and of one that
# was settled: accepted_ms started_ms cold_start_ms, or 0 for each
# Takes a request off its ledger and out of the orders of its version. What ended is noted once: with the ledger's
# entry, or, for a request that was set aside and has none, with that of the last order, of those that are due.
LEAVE = Script(
    _NOTE
    + """
local held = redis.call('HGET', KEYS[1], ARGV[1])
if held then
  redis.call('HDEL', KEYS[1], ARGV[1])
  if redis.call('HLEN', KEYS[1]) == 1 then
    redis.call('DEL', KEYS[1])
  else
    redis.call('HINCRBY', KEYS[1], '*', 0 - string.match(held, '^%d+'))
  end
end
local placed = 0
for i = 2, #KEYS do placed = redis.call('ZREM', KEYS[i], ARGV[2]) end
if ARGV[3] and (held or placed == 1) then note(KEYS[1], unpack(ARGV, 3)) end
return held and 1 or 0
"""
)

# KEYS version's ledger · ARGV minutes · returns {the present minute, then for each of the last `minutes` that something
# ended in: it, [field, value, …] as note() wrote them}
ACTIVITY = Script(
    _NOW
    + """
local last = math.floor(now / 60000)
local answer = {last}
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
return admit(KEYS[1], ARGV[1], ARGV[2] + 0, ARGV[2] .. ' ' .. ARGV[3], 0, 0)
"""
)

# Puts right what no release of ours left in a key that can be made anew (keys.rebuildable).
# KEYS key · ARGV zset, hash or string; numbers, a hash of nothing else; or ledger
# returns 1 if there was something to do
MEND = Script(
    """
local kind = redis.call('TYPE', KEYS[1]).ok
if kind == 'none' then return 0 end
if kind ~= ((ARGV[1] == 'numbers' or ARGV[1] == 'ledger') and 'hash' or ARGV[1]) then
  return redis.call('DEL', KEYS[1])
end
local entries = ARGV[1] ~= kind and redis.call('HGETALL', KEYS[1]) or {}
local sum, strange = 0, false
for i = 1, #entries, 2 do
  local bytes = string.match(entries[i + 1], ARGV[1] == 'ledger' and '^%d+' or '^%d+$')
  if bytes and #bytes > 15 then bytes = nil end
  if entries[i] ~= '*' and bytes then sum = sum + bytes end
  if not bytes then
    strange = true
    redis.call('HDEL', KEYS[1], entries[i])
  end
end
if ARGV[1] == 'numbers' and strange then redis.call('DEL', KEYS[1]) end
if ARGV[1] == 'ledger' then
  local was = redis.call('HGET', KEYS[1], '*')
  strange = strange or was ~= string.format('%d', sum)
  if strange then redis.call('HSET', KEYS[1], '*', string.format('%d', sum)) end
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

# KEYS from to · ARGV id · moves an id between the orders of a version, and keeps its place
# returns 0 if it had none
MOVE = Script(
    """
local score = redis.call('ZSCORE', KEYS[1], ARGV[1]) or redis.call('ZSCORE', KEYS[2], ARGV[1])
local placed = score and 1 or 0
if not score then
  local time = redis.call('TIME')
  score = time[1] * 1000000 + time[2]
end
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[2], score, ARGV[1])
return placed
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
