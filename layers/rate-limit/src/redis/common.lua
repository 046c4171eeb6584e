-- When a key's quota is whole again, its arrival time, is kept as whole
-- microseconds, `1790000001123456`; or with the rest that an interval of a
-- third of a second has, as `1790000001456789:333:1`, nanoseconds and parts of
-- one. In sums the two are one number, of parts of which a nanosecond has
-- `den`. All are integers below 2^53, which a double holds exactly.

local call, format = redis.call, string.format

-- What is stored, or now where that is later. What nobody here has written is
-- as nothing, or as far ahead as anything can be.
local function read(value, now, den)
  local u, r = tonumber(value), 0
  if not u then
    local whole, n, f = string.match(value, '^(%d+):(%d+):(%d+)$')
    if not whole then return now, 0 end
    u, n, f = whole + 0, n + 0, f + 0
    if n > 999 then n = 999 end
    if f >= den then f = den - 1 end
    r = n * den + f
  end
  if not (u >= now) then return now, 0 end
  if u > now + 288230376151711 then return now + 288230376151711, 0 end
  return u - u % 1, r
end

-- Stores it until then: rounded up, and a millisecond more, since the clock by
-- which keys expire has whole ones.
local function write(key, u, r, now, den)
  local ms = u - now + 999
  -- As integers, which are written in a third of the time of doubles, and cut
  -- off what is behind the point.
  local value = format('%d%06d', u / 1000000, u % 1000000)
  if r > 0 then
    value = format('%s:%d:%d', value, r / den, r % den)
    ms = ms + 1
  end
  call('PSETEX', key, format('%d', ms / 1000 + 1), value)
end

-- A number, or in MessagePack as many as there are keys, or twice that.
local function answer(ahead, left, count)
  if left then
    for i = 1, count do ahead[count + i] = left[i] or 0 end
  elseif count == 1 then
    return ahead[1]
  end
  return cmsgpack.pack(ahead)
end

