-- Charges what was let through while this server was away, and refuses
-- nothing.
--
-- KEYS: no key twice. ARGV: for each how far the arrival time lay ahead of now
-- (or behind it) when the first was let through, as far as was known; the
-- charge and the tolerance; in whole microseconds all three.
--
-- Answers as the script of checks does, of the times after it.
local values = call('MGET', unpack(KEYS))
local ahead = {}
for i = 1, #KEYS do
  local first, iu, tu = ARGV[3 * i - 2] + 0, ARGV[3 * i - 1] + 0, ARGV[3 * i] + 0
  local u, r = now + first, 0
  if values[i] then
    local su, sr = read(values[i], now, 1)
    -- Parts of a microsecond are rounded up: the charge is an estimate.
    if sr > 0 then su = su + 1 end
    if su > now and su > u then u = su end
  end
  u = u + iu
  if u > now + tu then u = now + tu end
  if u > now then
    write(KEYS[i], u, 0, now, 1)
  else
    u = now
  end
  ahead[i] = u - now
end
return answer(ahead, nil, #KEYS)
