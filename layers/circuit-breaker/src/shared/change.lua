-- A breaker's record is a hash: v version, s state, u its end and t when it
-- happened by this server's clock in ms, w the longest it may last, o who
-- wrote, h when something was last done by hand; and a vote for each process,
-- n:<process>, which counts until its value.
-- The index has all records of the fleet by version, and when it was begun
-- as e:<us> at 0.
local rec, idx = KEYS[1], KEYS[2]
local op, base, me = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local age, wait, quorum = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local channel, to, voter = ARGV[7], ARGV[8], ARGV[9]
-- For how long the callee asked to be left alone.
local asked = tonumber(ARGV[10])

-- Kept for so long after its end; so many in the index; leave is given so
-- much ahead of time.
local KEEP, MOST, AHEAD = 3600000, 10000, 500
local STATES = { c = true, o = true, p = true, fo = true, fc = true, m = true }
local OVERRIDES = { fo = true, fc = true, m = true }

local time = redis.call('TIME')
local us = time[1] * 1000000 + time[2]
local now = math.floor(us / 1000)
-- When what is asked for happened.
local at = now - age

local function of_type(key, wanted)
  local kind = redis.call('TYPE', key).ok
  if kind ~= wanted and kind ~= 'none' then redis.call('DEL', key) end
end
of_type(rec, 'hash')

local field = redis.call('HMGET', rec, 'v', 's', 'u', 'w', 't', 'o', 'h')
local function number(text)
  local n = text and string.match(text, '^%d+$') and tonumber(text)
  return n and n < 9007199254740992 and n or nil
end
local v, u, w, t = number(field[1]), number(field[3]), number(field[4]), number(field[5])
local s, o = field[2], field[6]
local h = number(field[7]) or 0
if not (v and u and w and t and o and s and STATES[s]) then
  -- Not written, or by someone else.
  if field[1] or field[2] then redis.call('DEL', rec) end
  v, s, u, w, t, o, h = 0, 'c', 0, 0, 0, '', 0
end

if t > now then
  -- This clock was set back, and nobody knows how long ago that was: over.
  u, t = math.min(u, now), 0
end
if h > now then h = 0 end

local function left()
  return math.max(0, math.min(u - now, w))
end

local function keep()
  local ttl = math.max(0, u - now) + KEEP
  if redis.call('PTTL', rec) < ttl then redis.call('PEXPIRE', rec, ttl) end
  if redis.call('PTTL', idx) < ttl + KEEP then redis.call('PEXPIRE', idx, ttl + KEEP) end
end

local function set(state, ends)
  of_type(idx, 'zset')
  local top = redis.call('ZREVRANGE', idx, 0, 0, 'WITHSCORES')
  local before = tonumber(top[2]) or 0
  if not (before >= 0 and before < 9007199254740990) then
    redis.call('DEL', idx)
    before = 0
  end
  if before == 0 then redis.call('ZADD', idx, 0, string.format('e:%.0f', us)) end
  v = math.max(us, before + 1, v + 1, base + 1)
  s, u, w, t, o = state, ends, math.max(0, ends - now), math.max(0, now - age), me
  local version = string.format('%.0f', v)
  redis.call('HSET', rec, 'v', version, 's', s, 'u', string.format('%.0f', u),
    'w', string.format('%.0f', w), 't', string.format('%.0f', t), 'o', o)
  redis.call('ZADD', idx, version, rec)
  redis.call('ZREMRANGEBYRANK', idx, 1, -(MOST + 1))
  keep()
  -- Who may not is heard of by pulls.
  redis.pcall('PUBLISH', channel, string.format('%s %.0f %s %.0f %s %s',
    version, before, s, left(), o, rec))
end

-- How many processes vote for open, this one among them.
local function vote()
  redis.call('HSET', rec, 'n:' .. voter, string.format('%.0f', now + wait))
  local all, live = redis.call('HGETALL', rec), 0
  for i = 1, #all, 2 do
    if string.sub(all[i], 1, 2) == 'n:' then
      if (number(all[i + 1]) or 0) > now then live = live + 1
      else redis.call('HDEL', rec, all[i]) end
    end
  end
  redis.call('PEXPIRE', rec, math.max(wait, redis.call('PTTL', rec), KEEP))
  return live
end

-- What was done by hand before this is past.
local function by_hand()
  h = math.max(h, at)
  redis.call('HSET', rec, 'h', string.format('%.0f', h))
end

local function forget_votes()
  local all = redis.call('HKEYS', rec)
  for i = 1, #all do
    if string.sub(all[i], 1, 2) == 'n:' then redis.call('HDEL', rec, all[i]) end
  end
end

-- What is gone is said again.
if op == 'keep' and v == 0 then op = 'hand' end
-- Whether what is asked for happened after what is written, or with it known.
local fresh = v == base or t <= at
-- Whether nothing was done by hand since, as far as milliseconds tell.
local last = h <= at + 2
-- An override stands over all that rules have done since, known or not.
if op == 'hand' then fresh = last and (fresh or OVERRIDES[to]) end
local mine = s == 'p' and o == me
local lapsed = s == 'p' and u <= now
local verdict = 'lost'

if op == 'trip' or op == 'reopen' then
  local again = op == 'reopen' and (mine or fresh and (s == 'o' or lapsed))
  if again or s == 'c' and fresh then
    if quorum <= 1 or vote() >= quorum then
      set('o', now + wait)
      verdict = 'took'
    else
      -- One whose probe failed alone: the others may try.
      if again then set('o', now) end
      verdict = 'voted'
    end
  elseif s == 'o' and asked > 0 and now + asked > u then
    set('o', now + asked)
    verdict = 'took'
  end
elseif op == 'claim' or op == 'seize' then
  -- By hand it may be all that is left of the end of an override.
  local seize = op == 'seize' and (s == 'o' or s == 'p' or s ~= 'c' and fresh and last)
  if seize or mine or lapsed or s == 'o' and u - now <= AHEAD then
    local from = now
    age = 0
    if s == 'o' and not seize and u > now then from = u end
    set('p', from + wait)
    if op == 'seize' then by_hand() end
    verdict = 'took'
  end
elseif op == 'close' then
  -- What is not written is closed; under a quorum others may be open alone.
  if s == 'c' and (v > 0 or quorum > 1) then
    redis.call('HDEL', rec, 'n:' .. voter)
    if v == base then verdict = 'took' end
  elseif s == 'c' or mine or fresh and (s == 'o' or lapsed) then
    forget_votes()
    set('c', now)
    verdict = 'took'
  end
elseif op == 'hand' and (fresh or s == to and OVERRIDES[to]) then
  verdict = 'took'
  if s == to and v > 0 and to ~= 'o' then keep()
  else
    if to ~= 'o' then forget_votes() end
    set(to, now + wait)
  end
  by_hand()
elseif op == 'keep' and s == to then
  keep()
  verdict = 'took'
end

return { verdict, v, s, left(), o == me and 1 or 0 }
