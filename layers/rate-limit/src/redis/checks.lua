-- Checks of any kind: one after the other, each charging all of its keys or
-- none.
--
-- KEYS: no key twice. ARGV: one array in MessagePack, flat. For each key its
-- tolerance in whole microseconds, what is left of it in parts of a
-- microsecond, and how many such parts a nanosecond has. Then for each check
-- how many keys it has, and of each its index and the charge in microseconds
-- and parts.
--
-- Answers as the script of checks alike does.
local args = cmsgpack.unpack(ARGV[1])
local count = #KEYS
local values = call('MGET', unpack(KEYS))
local us, rs, lus, lrs, dens, changed = {}, {}, {}, {}, {}, {}
local ahead, left = {}, nil
for i = 1, count do
  local den = args[3 * i]
  local u, r = now, 0
  if values[i] then u, r = read(values[i], now, den) end
  ahead[i] = u - now
  if r > 0 then
    left = left or {}
    left[i] = r
  end
  local lu, lr = now + args[3 * i - 2], args[3 * i - 1]
  if u > lu or (u == lu and r > lr) then
    u, r, changed[i] = lu, lr, true
  end
  us[i], rs[i], lus[i], lrs[i], dens[i] = u, r, lu, lr, den
end
local at, last = 3 * count + 1, #args
local xus, xrs = {}, {}
while at <= last do
  local keys = args[at]
  at = at + 1
  local passes = true
  for k = 0, keys - 1 do
    local i = args[at + 3 * k]
    local xu, xr = us[i] + args[at + 3 * k + 1], rs[i] + args[at + 3 * k + 2]
    if xr >= dens[i] * 1000 then
      xu, xr = xu + 1, xr - dens[i] * 1000
    end
    if xu > lus[i] or (xu == lus[i] and xr > lrs[i]) then
      passes = false
      break
    end
    xus[k], xrs[k] = xu, xr
  end
  if passes then
    for k = 0, keys - 1 do
      local i = args[at + 3 * k]
      if us[i] ~= xus[k] or rs[i] ~= xrs[k] then
        us[i], rs[i], changed[i] = xus[k], xrs[k], true
      end
    end
  end
  at = at + 3 * keys
end
for i = 1, count do
  if changed[i] then write(KEYS[i], us[i], rs[i], now, dens[i]) end
end
return answer(ahead, left, count)
